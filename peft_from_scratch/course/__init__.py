"""What a lesson imports, by name: `from peft_from_scratch.course import curves, start`.

A lesson takes the library from `peft_from_scratch` and all else from here: the figures,
the experiments, the stored runs and their verdicts, and the functions of the main job
that it looks into. So a module can move between rooms, and a learner's copy of a
lesson, in work/, runs as before. Nothing is imported before it is asked for.

Reading order: lesson.py (start, predictions, verdicts, the receipt), guesses.py (a
reader's ranges), cards.py (what a lesson takes), exercises.py (a learner's copies),
checks/ (what judges an answer), time_limit.py (the end of a learner's endless loop),
pictures/ (pictures of ideas), bit_costs.py (what four bits save and cost, counted),
compile_answer.py (a learner's kernel, compiled for GPUs), memory_plan.py (how long a
sequence fits).
"""

from ..common import lazy

MODULES = {  # room -> modules of it that lessons use
    "common": ("provenance",),
    "comparison": ("figures", "findings"),
    "course": ("bit_costs", "cards", "lesson", "memory_plan"),
    "course.pictures": (
        *("merge_picture", "merging_pictures", "weight_picture"),
        *("access_picture", "bfloat16_picture", "bottleneck_pictures"),
        *("code_books", "fitting_pictures", "gpu_pictures"),
        *("rounding_pictures", "storage_pictures"),
        *("lead_picture", "lora_bytes", "low_rank", "memory_picture", "page_picture"),
        *("serving_pictures", "size_runs", "soft_prompt_pictures", "step_picture"),
        *("family_runs", "tuning_pictures", "tuning_runs"),
    ),
    "ledger": ("intervals", "rates", "runs"),
    "ledger.experiments": (
        *("bill", "challengers", "constants", "counting", "data_size", "family"),
        *("finetune", "formats", "fusing", "latency", "many_adapters", "masters"),
        *("merged_time", "merging", "one_gpu", "own_rates", "paging"),
        *("rank_and_place", "recomputing", "roundings", "scaling", "spectrum"),
        *("standalone", "starts", "wrong_cache", "zero_ranks"),
    ),
    "files": ("combine",),
    "memory": ("budget", "changes", "formulas", "meta_model", "meter"),
    "models": ("minilm",),
    "plotting": ("curves", "roofline"),
}
NAMES = {  # module -> names in it that lessons use
    "common.quiet": ("quiet_transformers",),
    "comparison.timing": ("step_seconds",),
    "core.adapter": ("adapters", "disabled"),
    "core.counting": ("count",),
    "course.lesson": ("start",),
    "ledger.claim": ("Claim", "Rule"),
    "training.gradient_checkpointing": ("checkpointed",),
    "memory.setups": ("Setup",),
    "memory.shapes": ("read_config",),
    "training.chunked_loss": ("summed_loss_in_chunks",),
    "training.loss": ("summed_loss",),
    "ledger.intervals": ("mean_of", "nested_bootstrap", "over_seeds", "paired"),
    "plotting.block": ("block_picture",),
    "serving.batch": ("Batch", "Slots"),
    "serving.engine": ("Engine",),
    "serving.requests": ("Request",),
    "tasks.task": ("load_task",),
    "tasks.templates": ("encode_prompt",),
    "training.batch": ("left_pad",),
    "training.config": ("TrainConfig",),
    "common.statistics": ("wilson",),
    "training.evaluation": ("answer_rows",),
    "training.loop": ("train",),
}
MODULE_OF = {
    name: f"{room}.{name}" for room, names in MODULES.items() for name in names
}
MODULE_OF["ledger"] = "ledger.verdicts"

__getattr__, __dir__, __all__ = lazy.names(MODULE_OF, lazy.homes(NAMES))
