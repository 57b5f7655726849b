"""Laws of the contract, of the verbs, and of the choice of modules."""
