"""The fake score: the prior with a LoRA trained on current results (paper, Eq. 19), one per sample or one for all."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from smsbatch.diffusion.priors.adapter import Adapter
from smsbatch.diffusion.priors.stable_diffusion import Prior
from smsbatch.manifest import Fake

_FP16_LOSS_SCALE = 2.0**14  # undoes the mean over 4 x 64 x 64 entries, whose gradients are too small for fp16


class FakeScore:
    """B LoRAs, their optimizer, and the training step.

    The factors are A [B, r, in] and B [B, out, r] on every attention layer that the configuration names, applied by
    one batched product. The loss is the sum of the samples' means and AdamW works element by element, so this *is* B
    separate runs, up to the rounding of the kernels. A batch has one row per LoRA or, for a single LoRA, any number.

    Args:
        generators: one per LoRA; each draws its initial values (A Kaiming-uniform as peft's, B zero).

    Attributes:
        factors: the parameters, by "down.<layer>" and "up.<layer>".
        optimizer: of the factors, in their order.
    """

    def __init__(self, prior: Prior, config: Fake, generators: Sequence[torch.Generator]) -> None:
        self.prior, self.config = prior, config
        self._down: dict[str, Tensor] = {}
        self._up: dict[str, Tensor] = {}
        for name, layer in prior.layers().items():
            if not name.endswith(config.layers):
                continue
            out_features, in_features = layer.weight.shape  # type: ignore[misc]
            bound = in_features**-0.5  # kaiming_uniform with a = sqrt(5)
            draws = [
                torch.empty(config.rank, in_features).uniform_(-bound, bound, generator=generator)
                for generator in generators
            ]
            up = torch.zeros(len(generators), out_features, config.rank, device=prior.device)
            self._down[name] = torch.stack(draws).to(prior.device).requires_grad_()
            self._up[name] = up.requires_grad_()
        self.factors = {f"down.{name}": factor for name, factor in self._down.items()}
        self.factors |= {f"up.{name}": factor for name, factor in self._up.items()}
        self.optimizer = torch.optim.AdamW(
            self.factors.values(), lr=config.learning_rate, betas=config.betas, weight_decay=config.weight_decay
        )
        self._loss_scale = _FP16_LOSS_SCALE if prior.dtype == torch.float16 else 1.0

    def adapter(self, rows: int) -> Adapter:
        """The adapter that makes the first `rows` rows of a prior's call the fake score's; row i has LoRA i % B."""
        return Adapter(self.config.alpha / self.config.rank, self._down, self._up, rows)

    def predict(self, z: Tensor, t: Tensor, eps: Tensor, text: Tensor) -> Tensor:
        """The noise prediction [N, C, h, w] of `z` noised by `eps` at `t` [N], with its graph."""
        with torch.enable_grad():
            return self.prior.noise(self.prior.schedule.add_noise(z, t, eps), t, text, self.adapter(len(z)))

    def train_step(self, z: Tensor, t: Tensor, eps: Tensor, text: Tensor) -> Tensor:
        """One AdamW step of every sample's LoRA at its own `z`, `t` [B] and `eps`; returns the losses [B]."""
        return self.learn(self.predict(z, t, eps, text), t, eps)

    def learn(self, e: Tensor, t: Tensor, eps: Tensor) -> Tensor:
        """`train_step`, given the prediction `e` [B, C, h, w] with its graph."""
        losses = self.add_gradient(e, t, eps)
        self.update()
        return losses

    def add_gradient(self, e: Tensor, t: Tensor, eps: Tensor, share: float = 1.0) -> Tensor:
        """Add the gradient of `share` times the sum of the losses [N], and return these: MSE of the model's own output.

        The output is the noise or, under v-prediction, v, whose error is the noise's divided by a_t. With weight
        "alpha_bar" the error is scaled by abar_t before squaring, as in the released code.
        """
        schedule = self.prior.schedule
        with torch.enable_grad():
            error = e - eps
            if self.prior.prediction == "v_prediction":
                error = error / schedule.a(t).clamp_min(1e-6)  # a_999 is 0 in a schedule that ends in pure noise
            if self.config.weight == "alpha_bar":
                error = error * schedule.abar[t].view(-1, 1, 1, 1)
            losses = error.square().flatten(1).mean(1)
            (losses.sum() * (share * self._loss_scale)).backward()  # type: ignore[no-untyped-call]
        return losses.detach()

    def update(self, average: Callable[[list[Tensor]], None] = lambda tensors: None) -> None:
        """One AdamW step along the added gradients, once `average` has made them means over all workers."""
        gradients = [factor.grad for factor in self.factors.values() if factor.grad is not None]
        if self._loss_scale != 1:
            for gradient in gradients:
                # An overflow is left out of this one step; a persistent fault still ends as `diverged`.
                gradient.div_(self._loss_scale).nan_to_num_(0.0, 0.0, 0.0)
        average(gradients)
        self.optimizer.step()
        self.optimizer.zero_grad()
