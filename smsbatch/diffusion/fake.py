"""The fake score: the prior with one LoRA per sample, trained on that sample's current result (paper, Eq. 19)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from smsbatch.diffusion.prior import Adapter, Prior
from smsbatch.manifest import Fake

__all__ = ["FakeScore"]

_FP16_LOSS_SCALE = 2.0**14  # the mean over a latent of 4 x 64 x 64 and fp16's smallest numbers cancel


class FakeScore:
    """The LoRAs of B samples, their optimizer, and the training step.

    The factors are A [B, r, in] and B [B, out, r] on every attention layer the configuration names, applied by one
    batched product. Losses are summed over samples of per-sample means and AdamW works element by element, so this *is*
    B separate runs, up to the rounding of the kernels.

    Args:
        generators: one per sample; each draws its own LoRA's initial values (A Kaiming-uniform as peft's, B zero).
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
        self._optimizer = torch.optim.AdamW(
            [*self._down.values(), *self._up.values()],
            lr=config.learning_rate,
            betas=config.betas,
            weight_decay=config.weight_decay,
        )
        self._loss_scale = _FP16_LOSS_SCALE if prior.dtype == torch.float16 else 1.0

    def adapter(self, rows: int) -> Adapter:
        """What makes the first `rows` rows of a call to the prior those of the fake score; row i is sample i % B's."""
        return Adapter(self.config.alpha / self.config.rank, self._down, self._up, rows)

    def train_step(self, z: Tensor, t: Tensor, eps: Tensor, text: Tensor) -> Tensor:
        """One AdamW step of every sample's LoRA at its own `z`, `t` [B] and `eps`; the losses [B]."""
        with torch.enable_grad():
            e = self.prior.noise(self.prior.schedule.add_noise(z, t, eps), t, text, self.adapter(len(z)))
        return self.learn(e, t, eps)

    def learn(self, e: Tensor, t: Tensor, eps: Tensor) -> Tensor:
        """The step, given the prediction `e` [B, C, h, w] with its graph: MSE of what the model itself predicts.

        That is the noise or, under v-prediction, v, whose error is the noise's by a_t. With weight "alpha_bar" the
        error is scaled by abar_t before squaring, as the released code's is.
        """
        schedule = self.prior.schedule
        with torch.enable_grad():
            error = e - eps
            if self.prior.prediction == "v_prediction":
                error = error / schedule.a(t).clamp_min(1e-6)  # a_999 is 0 in a schedule that ends in pure noise
            if self.config.weight == "alpha_bar":
                error = error * schedule.abar[t].view(-1, 1, 1, 1)
            losses = error.square().flatten(1).mean(1)
            self._optimizer.zero_grad()
            (losses.sum() * self._loss_scale).backward()  # type: ignore[no-untyped-call]
        if self._loss_scale != 1:
            for factor in (*self._down.values(), *self._up.values()):
                assert factor.grad is not None
                # What overflowed is left out of this one step; what is wrong for good still ends as `diverged`.
                factor.grad = (factor.grad / self._loss_scale).nan_to_num(0.0, 0.0, 0.0)
        self._optimizer.step()
        return losses.detach()
