# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
r"""Sample explanations of given solutions from a teacher that sees them, and write a data set for a student.

    selfdistill explanations --out explained.jsonl recipe=rlt checkpoint.load=runs/rlt/checkpoints \
        data.path=problems.jsonl data.tokenizer=/models/Qwen3-8B
    torchrun --nproc-per-node 8 -m megatron_selfdistill explanations --out explained.jsonl ...
    selfdistill method.name=sft data.path=explained.jsonl ...

The settings are the keys of `selfdistill`: model, layout, data, the wording of the teacher's prompt, and rollout (the
sampler and its parameters).  Give those with which the teacher was trained.  A problem needs a solution.  In the file,
the solution of a problem is the explanation, method.closing_tag of method.name=rlt and the given solution; an
explanation without its closing tag is not written.  The file appears when all problems are done.  Meanwhile and
afterwards, explained.attempts.jsonl records the result of each problem, so that the same command continues after a
kill.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from megatron_selfdistill.methods.data_sets.data_set_command import configured, parser_of, run_command

if TYPE_CHECKING:  # these imports take seconds, for which --help and a mistyped option should not wait
    from megatron_selfdistill.config import Config
    from megatron_selfdistill.data.run_data import RunData
    from megatron_selfdistill.distributed.ranks import RankGrid
    from megatron_selfdistill.methods.data_sets.data_set_job import DataSetWork


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line ``argv`` and return the exit status: 0, or 2 after a message about bad input."""
    parser = parser_of("explanations", __doc__, wanted="explanations", num_samples=1)
    arguments = parser.parse_intermixed_args(argv)

    def config() -> Config:
        from megatron_selfdistill.errors import ConfigError

        found = configured(arguments)
        if found.data.kind != "problems":
            raise ConfigError(f"expected solutions that can be explained, of data.kind=problems, got {found.data.kind}")
        return found

    def work(config: Config, run_data: RunData, grid: RankGrid) -> DataSetWork:
        from megatron_selfdistill.methods.data_sets.data_set_job import ExplanationWork
        from megatron_selfdistill.methods.rlt import RltSettings

        settings = config.method if isinstance(config.method, RltSettings) else RltSettings("rlt")
        tag = settings.closing_tag
        return ExplanationWork(config, run_data, grid, arguments.hf, arguments.num_samples, tag, arguments.keep)

    return run_command("explanations", arguments, config, work)
