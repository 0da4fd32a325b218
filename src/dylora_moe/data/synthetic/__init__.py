"""Built-in skill sets for training small models offline: Requests, the Stripe API, Flask.

Each skill is a set of task families whose solutions the tests run against the real library.
"""

from dylora_moe.data.synthetic.family import Draft, Family
from dylora_moe.data.synthetic.make import SKILLS, families, make_examples

__all__ = ["SKILLS", "Draft", "Family", "families", "make_examples"]
