"""placeholder"""

from .provenance import ROOT

WORK = ROOT / "work"
