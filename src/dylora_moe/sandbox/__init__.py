"""Programs that a model wrote, run where they can do no harm: text and limits in, an outcome out.

Not covered: holes in the kernel; what a program learns by timing or by the load of the machine; that it slows down what
runs beside it; an exit code 0 that it gives itself before its tests ran. `docs/sandbox.md` has the rest, by back end.
"""

from dylora_moe.sandbox.find import NAMES, BackEnd, find_sandbox, try_back_end
from dylora_moe.sandbox.limits import Ending, Limits, Outcome
from dylora_moe.sandbox.sandbox import Sandbox

__all__ = ["NAMES", "BackEnd", "Ending", "Limits", "Outcome", "Sandbox", "find_sandbox", "try_back_end"]
