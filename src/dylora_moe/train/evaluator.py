"""Evaluations while training: as many rows at a time as fit into memory."""

from collections.abc import Callable, Mapping, Sequence

import torch

from dylora_moe import ranks
from dylora_moe.data.batching import TokenizedRow
from dylora_moe.errors import OnlyHere, RunError
from dylora_moe.evaluate.losses import Evaluation, evaluate_domains
from dylora_moe.train.parts import is_out_of_memory
from dylora_moe.tuner import DyLoraModel
from dylora_moe.tuner.head import Head


class Evaluator:
    """Measures a model on the validation rows of every domain.

    Args:
        head: Of the base.
        validation: Domain -> rows; the domains' order gives meaning to a row's `domain`.
        rows: Of one pass.
        pad_token_id: What fills short rows.
        tell: Takes what a person should know.

    Attributes:
        rows: Of one pass; halved when memory runs out.
    """

    def __init__(
        self,
        head: Head,
        validation: Mapping[str, Sequence[TokenizedRow]],
        *,
        rows: int,
        pad_token_id: int,
        tell: Callable[[str], None],
    ) -> None:
        self._head, self._validation, self._pad_token_id, self._tell = head, validation, pad_token_id, tell
        self.rows = rows

    def run(self, model: DyLoraModel, before_batch: Callable[[], None] = lambda: None) -> Evaluation:
        """Evaluate.

        Args:
            model: Left in the mode it was in.
            before_batch: Called before each pass; what it raises ends the evaluation.

        Raises:
            RunError: Not even one row fits into memory.
        """
        rows = self.rows
        while True:
            try:
                evaluation = evaluate_domains(
                    model,
                    self._head,
                    self._validation,
                    batch_size=self.rows,
                    pad_token_id=self._pad_token_id,
                    before_batch=before_batch,
                )
                break
            except Exception as error:
                if not is_out_of_memory(error):
                    raise
                if ranks.count() > 1:  # the others are in the middle of this evaluation
                    raise OnlyHere(
                        f"An evaluation must fit into memory, and does not: {error} Lower eval_batch_size."
                    ) from error
                if self.rows == 1:
                    raise RunError(
                        f"An evaluation must fit into memory, and one row does not: {error} Lower max_length, or set "
                        "load_in_4bit."
                    ) from error
            # Outside of the handler, whose error holds on to the memory of the pass.
            self.rows //= 2
            if torch.cuda.is_available():
                torch.cuda.empty_cache()
        if self.rows < rows:
            self._tell(f"Memory ran out in an evaluation. From here on it takes {self.rows} rows at a time.")
        return evaluation
