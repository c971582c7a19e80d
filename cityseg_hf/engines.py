"""How gradients become new weights, and where weights lie: the one thing that engines of training differ in."""

from contextlib import nullcontext
from typing import Any

from accelerate import Accelerator
from torch import Tensor, nn
from transformers import PreTrainedModel

from cityseg_hf.checkpoint import Stateful
from cityseg_hf.config import OptimConfig
from cityseg_hf.optim import make_optimizer


class DataParallel:
    """One process, or several of which each has all weights and the optimiser's whole state.

    Args:
        accelerator: from ``launch.make_accelerator``.
        network: as it starts.
        criterion: the network and its loss in one module; ``self.criterion`` is what Accelerate makes of it.
        config: of the optimiser.

    Attributes:
        whole: a network that has all weights on this process, once ``refresh`` was called: it is judged and saved.
        gathers: whether every process must take part when the state of ``parts`` is read.
    """

    gathers = False

    def __init__(
        self, accelerator: Accelerator, network: PreTrainedModel, criterion: nn.Module, config: OptimConfig
    ) -> None:
        self.accelerator, self.network, self.max_grad_norm = accelerator, network, config.max_grad_norm
        self.whole = network
        self.optimizer = make_optimizer(network, config)
        self.criterion, self.prepared = accelerator.prepare(criterion, self.optimizer)

    def backward(self, loss: Tensor, *, last: bool) -> None:
        """Adds gradients; they cross processes once a step, with the ``last`` batch."""
        # Data parallelism averages gradients over processes; the division by the valid pixels has done so already.
        self.accelerator.backward(loss * self.accelerator.num_processes)

    def accumulating(self, *, last: bool) -> Any:
        """The context of forward and backward of a batch."""
        return nullcontext() if last else self.accelerator.no_sync(self.criterion)

    def update(self) -> Tensor:
        """Changes the weights, but for a gradient that is not finite. The host is not asked.

        Returns:
            ``bool`` scalar: the step was skipped. All processes have the same.
        """
        parameters = [parameter for parameter in self.criterion.parameters() if parameter.grad is not None]
        self.accelerator.unscale_gradients()
        norm = nn.utils.get_total_norm([parameter.grad for parameter in parameters])
        bad = ~norm.isfinite()
        if self.max_grad_norm is not None:
            nn.utils.clip_grads_with_norm_(parameters, self.max_grad_norm, norm)
        if self.accelerator.scaler is None:  # else the scaler skips, and lowers its factor
            self.optimizer.found_inf = bad.float()  # the fused kernel's own way to skip
        self.prepared.step()
        self.prepared.zero_grad()
        return bad

    def refresh(self) -> None:
        """Brings the weights to ``whole``. A collective call."""

    def parts(self) -> dict[str, Stateful]:
        """What a run goes on from, by its name in a checkpoint."""
        return {"network": self.network, "optimizer": self.optimizer}
