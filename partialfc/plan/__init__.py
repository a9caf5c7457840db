"""What a run will need, before it is started: memory, largest number of identities, least time, communication.

Nothing is downloaded, no data is read but the number of its classes, and no GPU is used. `head` and `backbone` count on
small or valueless copies of the real parts, so that the plan says what the code does; `saves` counts what checkpoints
take on the real state; `report` adds up, `table` prints.
"""

from partialfc.plan.report import Machine, Plan, make_plan
from partialfc.plan.sizes import format_bytes, parse_bytes
from partialfc.plan.table import plan_table

__all__ = ["Machine", "Plan", "format_bytes", "make_plan", "parse_bytes", "plan_table"]
