# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""The work between the passes as two Triton kernels.

Twin: `sharded/token_statistics.py`.
The functions here have the contracts of the twin and launch the kernels of statistics_kernels.py.
In PyTorch this work is hundreds of operations on [T, J] numbers, whose launches take a GPU longer than its passes over
the logits.
All arithmetic is float64, a program has all parts of a few tokens, and every rank has the same parts: so every rank
gets the same bits.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
import triton
from torch import Tensor

from megatron_selfdistill.kernels.pass_launches import ALL_REGISTERS, COMPILED, as_sum, launching_on, mix_of
from megatron_selfdistill.kernels.statistics_kernels import NUM_STATE, finish_kernel, solve_kernel
from megatron_selfdistill.loss.sharded.shard_sums import BetaGrid, TokenConstants
from megatron_selfdistill.loss.sharded.token_statistics import TokenResults

NUMBERS = 32
"""Parts times tokens of a program: one number per thread of a warp while parts are merged."""
PARTS_PER_WARP = 64
"""Parts of one token per warp: two numbers per thread.  With four, some kernels spill registers."""
MOST_WARPS = 8
"""The largest number of warps of a program, for which there are registers with 255 of each thread."""
SOLVING = {**COMPILED, **ALL_REGISTERS}
"""The options with which the kernels are compiled."""
MOST_ROWS = 32
"""The largest number of tokens of a program: one per thread after the merging."""
RESULTS = (
    "reverse_kl forward_kl student_entropy teacher_entropy target_entropy "
    "student_log_prob teacher_log_prob target_log_prob"
).split()
"""The float32 fields of `TokenResults` in the order in which ``finish_kernel`` writes them."""


@dataclass(frozen=True)
class KernelState:
    """Every token between two passes.

    state: [NUM_STATE, T] and shift: [parts, T], float64; grid_entropies: [T, num_grid].
    constants: the input of the next pass.
    outputs: the outputs of the second pass, where the third pass overwrites what it changes; None before.
    """

    state: Tensor
    shift: Tensor
    constants: TokenConstants
    grid_entropies: Tensor
    outputs: _Outputs | None = None


def solve_tokens(gathered: Tensor, grid: BetaGrid, reference_entropy: Tensor | None = None) -> KernelState:
    """Launch the kernel of `token_statistics.solve_tokens`."""
    num_parts, num_rows, _ = gathered.shape
    state, shift = (gathered.new_empty(n, num_rows, dtype=torch.float64) for n in (NUM_STATE.value, num_parts))
    constants, entropies = gathered.new_empty(6, num_rows), gathered.new_empty(num_rows, grid.num_grid)
    if num_rows:
        programs, sizes = _programs(num_rows, num_parts)
        with launching_on(gathered):
            solve_kernel[programs](
                gathered,
                gathered if reference_entropy is None else reference_entropy.contiguous(),
                grid.on(gathered.device),
                state,
                shift,
                constants,
                entropies,
                num_rows,
                num_parts,
                as_sum(grid.mix_weights[0]),
                MIX=mix_of(grid.mix_weights),
                J=len(grid.betas),
                NUM_GRID=grid.num_grid,
                FAVOURED=grid.favoured,
                GIVEN=grid.given,
                MATCH_REFERENCE=reference_entropy is not None,
                **sizes,
            )
    return KernelState(state, shift, TokenConstants(*constants.unbind(0)), entropies)


def finish_tokens(
    kernel_state: KernelState, gathered: Tensor, grid: BetaGrid, response_tokens: Tensor | None, vocab_size: int
) -> tuple[TokenResults, KernelState]:
    """Launch the kernel of `token_statistics.finish_tokens`.

    The results of the second call overwrite the results of the first call.
    """
    num_parts, num_rows, num_columns = gathered.shape
    outputs = kernel_state.outputs or _Outputs.new(gathered, kernel_state.grid_entropies)
    if num_rows:
        programs, sizes = _programs(num_rows, num_parts)
        with launching_on(gathered):
            finish_kernel[programs](
                kernel_state.state,
                kernel_state.shift,
                gathered,
                outputs.status if response_tokens is None else response_tokens.contiguous(),
                grid.on(gathered.device),
                *outputs.pointers(),
                num_rows,
                num_parts,
                vocab_size,
                as_sum(grid.mix_weights[0]),
                MIX=mix_of(grid.mix_weights),
                NUM_GRID=grid.num_grid,
                GIVEN=grid.given,
                LOWEST_IS_BOUND=grid.lowest_is_bound,
                HAS_TOKENS=response_tokens is not None,
                SOME_ROWS=kernel_state.outputs is not None,
                NUM_COLUMNS=num_columns,
                **sizes,
            )
    results = outputs.results()
    return results, replace(kernel_state, constants=results.constants, outputs=outputs)


@dataclass(frozen=True)
class _Outputs:
    """The outputs of ``finish_kernel``.

    numbers: float32 [len(RESULTS), T]; constants: float32 [6, T]; exact: float64 [2, T], beta and the log-normaliser.
    status: int64 [T]; agreement: bool [T]; grid_entropies: float32 [T, num_grid].
    """

    numbers: Tensor
    constants: Tensor
    exact: Tensor
    status: Tensor
    agreement: Tensor
    grid_entropies: Tensor

    @classmethod
    def new(cls, gathered: Tensor, grid_entropies: Tensor) -> _Outputs:
        """Return empty outputs for the tokens of ``gathered``."""
        num_rows = gathered.shape[1]
        return cls(
            gathered.new_empty(len(RESULTS), num_rows),
            gathered.new_empty(6, num_rows),
            gathered.new_empty(2, num_rows, dtype=torch.float64),
            gathered.new_empty(num_rows, dtype=torch.int64),
            gathered.new_empty(num_rows, dtype=torch.bool),
            grid_entropies,
        )

    def pointers(self) -> tuple[Tensor, ...]:
        """Return the tensors that the kernel writes, in the order of its parameters."""
        return self.numbers, self.constants, self.exact, self.status, self.agreement.view(torch.uint8)

    def results(self) -> TokenResults:
        """Return the outputs as `TokenResults`."""
        return TokenResults(
            constants=TokenConstants(*self.constants.unbind(0)),
            beta=self.exact[0],
            log_normaliser=self.exact[1],
            status=self.status,
            top1_agreement=self.agreement,
            grid_entropies=self.grid_entropies,
            **dict(zip(RESULTS, self.numbers.unbind(0), strict=True)),
        )


def _programs(num_rows: int, num_parts: int) -> tuple[tuple[int], dict[str, int | bool]]:
    """Return the number of programs of a launch, and the options of the kernel."""
    options = launch_options(num_parts)
    return (triton.cdiv(num_rows, options["ROWS"]),), options


def launch_options(num_parts: int) -> dict[str, int | bool]:
    """Return ROWS and PARTS of a program, and the options with which its kernel is compiled."""
    parts = triton.next_power_of_2(num_parts)
    rows = max(1, min(MOST_ROWS, NUMBERS // parts))
    num_warps = max(1, min(MOST_WARPS, parts // PARTS_PER_WARP))
    return {"ROWS": rows, "PARTS": parts, "num_warps": num_warps, **SOLVING}
