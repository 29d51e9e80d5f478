"""The command line: `python -m roi_lib exam|sweep|osmckp|train|bench|diagnose|moments|...`.

Whatever a user can get wrong ends in one sentence on standard error and exit status 2.
"""

import argparse
import json
import sys
from dataclasses import asdict, is_dataclass, replace
from pathlib import Path

from roi_lib.files import write_json


def check_writable(option: str, path: Path | None) -> None:
    """Refuse an option's output file that cannot be written before the work starts."""
    if path is not None and not path.parent.is_dir():
        raise FileNotFoundError(f"the folder of {option} does not exist: {path.parent}")
    if path is not None and path.is_dir():
        raise ValueError(f"{option} names a folder: {path}")


def exam(args) -> None:
    """Sit papers in three orders under each budget."""
    from roi_lib.evaluation import (
        Setting,
        difference_table,
        exam_table,
        make_records,
        position_table,
        shortfall_table,
        sit_methods,
    )
    from roi_lib.manifests import make_manifest
    from roi_lib.worlds import get_world

    check_writable("--out", args.out)
    check_writable("--write-papers", args.write_papers)
    check_writable("--plot", args.plot)
    world = get_world(args.world)
    names = method_names(world, args.methods)
    papers, split = exam_papers(args, world)
    if args.write_papers:
        write_json(args.write_papers, asdict(make_manifest(world, papers, split, args.seed)))
        print(f"wrote {args.write_papers}")
    setting = Setting(world, papers, args.seed, args.temperature, args.model, args.tokenizer,
                      engine_choice(args, world), args.samples)
    budgets = args.budgets or world.budgets
    results = sit_methods(setting, names, budgets, args.workers)
    records = make_records(setting, results)
    tables = exam_table, position_table, shortfall_table, difference_table
    print("\n\n".join(filter(None, (table(records) for table in tables))))
    report_failures(args, records)
    note_on_one_exam(len(papers))
    if args.out:
        write_json(args.out, records)
        print(f"wrote {args.out}")
    if args.save:
        from roi_lib.rollouts import save_rollouts

        save_rollouts(args.save, setting, results, records, split)
        print(f"wrote {args.save}")
    if args.plot:
        from roi_lib.plots import score_split, tokens_by_position, use_style

        use_style()
        first = [record for record in records if record["method"] == records[0]["method"]]
        compared = any("rational" in record for record in records)
        figure = (score_split(records, min(budgets)) if compared
                  else tokens_by_position(first))
        figure.savefig(args.plot)
        print(f"wrote {args.plot}")


def note_on_one_exam(exams: int) -> None:
    """Say why there are no intervals."""
    if exams == 1:
        print("note: one exam has no interval; give --exams 2 at least", file=sys.stderr)


def method_names(world, given: list[str]) -> list[str]:
    """The methods that `--methods` names; "all" stands for those with a model that is there."""
    from roi_lib.methods import available

    for name in given:
        if name != "all":
            world.method(name)
    here = available(world)
    if "all" in given and not here:
        raise ValueError(f"no method of the world {world.name} has its checkpoint on this machine; "
                         "name methods whose checkpoints the hub has, such as --methods base")
    return [name for word in given for name in (here if word == "all" else [word])]


def exam_papers(args, world):
    """The papers that the options of `exam` name, and their split; a manifest sets the seed."""
    from roi_lib.exams import draw_papers
    from roi_lib.manifests import read_manifest, restore_papers
    from roi_lib.sources import load_jsonl

    own = load_jsonl(args.problems) if args.problems else None
    if not args.papers:
        return draw_papers(world, args.exams, args.problems_per_exam, "test", args.seed,
                           args.data, own, args.tiers), "test"
    manifest = read_manifest(args.papers)
    if manifest.world != world.name:
        raise ValueError(f"{args.papers} holds papers of the world {manifest.world}; "
                         f"give --world {manifest.world}")
    args.seed = manifest.seed
    return restore_papers(manifest, args.data, own), manifest.split


def sweep(args) -> None:
    """Let methods sit under one setting after another, into a CSV file."""
    from roi_lib.evaluation import EngineChoice
    from roi_lib.sweeps import points, run_sweep, write_sweep
    from roi_lib.worlds import get_world

    check_writable("--out", args.out)
    world, rows = get_world(args.world), []
    names, total = method_names(world, args.methods), len(points(world, args.sweep))
    choice = EngineChoice(args.engine, log=args.log, every=args.progress or None,
                          dtype=arithmetic(args, world))
    for part in run_sweep(world, args.sweep, names, args.exams, args.seed, args.data, choice,
                          args.workers):
        rows += part
        print(f"{len({row['x'] for row in rows})} settings done" if total > 1 else "done",
              file=sys.stderr)
    note_on_one_exam(args.exams)
    write_sweep(args.out, rows)
    print(f"wrote {args.out}: {len(rows)} rows")


def arithmetic(args, world) -> str | None:
    """The torch engine's arithmetic: as `--dtype` has it, or the world's for tables."""
    return args.dtype or (world.table_dtype if args.engine == "torch" else None)


def engine_choice(args, world):
    """The engine that the options of `exam` name."""
    from roi_lib.evaluation import EngineChoice

    options = {}
    if args.engine == "openai":
        options = {"base_url": args.base_url, "api": args.api, "key_variable": args.key_variable,
                   "concurrency": args.concurrency, "retries": args.retries,
                   "timeout": args.timeout}
    return EngineChoice(args.engine, options, args.log, args.progress or None,
                        arithmetic(args, world))


def report_failures(args, records) -> None:
    """What a server charged, and whether it left responses out."""
    from roi_lib.engines import Usage

    for record in records:
        if "usage" in record:
            print(f"{record['method']}: {Usage(**record['usage']).report(*args.price)}")
    failed = sum(record["failed"] for record in records)
    if failed:
        remedy = "run the same command again" if args.log else "use --log to keep the others"
        print(f"warning: {failed} responses failed and count as empty; {remedy}", file=sys.stderr)


def osmckp(args) -> None:
    """Solve one instance exactly."""
    from roi_lib.osmckp import solve_document

    try:
        document = json.loads(args.instance.read_text(encoding="utf-8-sig"))
    except (ValueError, RecursionError) as error:  # no JSON, no UTF-8, or nested without end
        raise ValueError(f"{args.instance} is not JSON: {error}") from error
    print(json.dumps(solve_document(document), indent=1))


def train_pretrain(args) -> None:
    """Pre-train the pocket base model."""
    from roi_lib.pretrain import PretrainConfig, pretrain
    from roi_lib.worlds import get_world

    config = PretrainConfig(seed=args.seed, **({"steps": args.steps} if args.steps else {}))
    pretrain(get_world(args.world), args.out, args.work, config)


def train_mft(args) -> None:
    """Meta-Cognitive Fine-Tuning: from a base model to one that predicts levels and skips."""
    from roi_lib.mft import run
    from roi_lib.worlds import get_world

    world = get_world(args.world)
    run(world, args.out or Path(f"data/{world.name}-mft"), args.work,
        change(world.mft, args.set), args.model, args.engine, args.data)


def change(recipe, settings: list[str]):
    """A recipe with some fields changed by `name=value`, those of a recipe inside by `a.b=value`.

    Several values are separated by commas, as in budgets=64,128.

    Raises:
        ValueError: unknown name, or a value of another kind.
    """
    for setting in settings:
        path, _, text = setting.partition("=")
        name, _, inner = path.partition(".")
        if not hasattr(recipe, name) or inner and not is_dataclass(getattr(recipe, name)):
            known = ", ".join(asdict(recipe))
            raise ValueError(f"the recipe has no {path!r}; choose from {known}")
        old = getattr(recipe, name)
        value = change(old, [f"{inner}={text}"]) if inner else read_value(type(old), text, setting)
        recipe = replace(recipe, **{name: value})
    return recipe


def read_value(kind: type, text: str, setting: str):
    """The value of a setting, of that kind.

    Raises:
        ValueError: it is of another kind.
    """
    try:
        value = text if kind is str else json.loads(f"[{text}]" if kind is tuple else text)
    except json.JSONDecodeError as error:
        raise ValueError(f"--set {setting}: the value must be a {kind.__name__}") from error
    if kind is tuple:
        return tuple(tuple(v) if isinstance(v, list) else v for v in value)
    if not isinstance(value, (int, float) if kind is float else kind):
        raise ValueError(f"--set {setting}: the value must be a {kind.__name__}")
    return value


def train_rarl(args) -> None:
    """Rationality-Aware RL: from the MFT model to one that allocates its budget."""
    from roi_lib.rarl_run import run
    from roi_lib.worlds import get_world

    world = get_world(args.world)
    recipe = change(world.rarl, [f"seed={args.seed}", *args.set])
    run(world, args.out or Path(f"data/{world.name}-rarl"), args.work, recipe, args.model,
        args.papers, args.engine, args.vllm_url, args.data)


def train_ablations(args) -> None:
    """RARL again and again with one thing changed, in one table."""
    from roi_lib.ablations import EXAMS, STEPS, ablate
    from roi_lib.worlds import get_world

    check_writable("--out", args.out)
    world = get_world(args.world)
    recipe = change(world.rarl, [f"steps={STEPS}", f"exams={EXAMS}", f"seed={args.seed}",
                                 *args.set])
    ablate(world, recipe, args.work, args.out, args.variants, args.papers, args.jobs,
           args.threads, args.data)
    print(f"wrote {args.out}")


def train_tokenizer(args) -> None:
    """Make a world's own tokenizer."""
    from roi_lib.tokenizer import make_tokenizer
    from roi_lib.worlds import DATA, get_world

    world = get_world(args.world)
    make_tokenizer(world, args.out or DATA / world.tokenizer, args.data)


def bench_osmckp(args) -> None:
    """Time the exact solver beside a mixed-integer program."""
    from roi_lib.bench_osmckp import bench

    run_bench(bench, args.out)


def bench_generation(args) -> None:
    """Time the torch engine beside transformers' generate and vLLM."""
    from roi_lib.bench_generation import bench

    run_bench(bench, args.out)


def bench_rarl(args) -> None:
    """Time a step of RARL beside one of TRL's GRPOTrainer."""
    from roi_lib.bench_rarl import bench

    run_bench(bench, args.out)


def run_bench(bench, out: Path | None) -> None:
    """Print what a benchmark measures, and write it to `out` if given."""
    check_writable("--out", out)
    result = bench()
    print(json.dumps(result, indent=1))
    if out:
        write_json(out, result)


def diagnose(args) -> None:
    """Say why a RARL run does not learn, from its log."""
    from roi_lib.diagnosis import diagnose, report

    print(report(diagnose(args.log)))


def moments(args) -> None:
    """Look at the models that a RARL run kept: when did it learn to skip?"""
    from roi_lib.moments import moments
    from roi_lib.worlds import get_world

    check_writable("--out", args.out)
    write_json(args.out, moments(get_world(args.world), args.work, args.papers, args.seed,
                                 args.data))
    print(f"wrote {args.out}")


def seeds(args) -> None:
    """Put RARL checkpoints of several seeds into one table."""
    from roi_lib.moments import write_seeds

    check_writable("--out", args.out)
    write_seeds(args.checkpoints, args.out)
    print(f"wrote {args.out}")


def doctor(args) -> None:
    """Check the environment."""
    from roi_lib.doctor import check_environment

    if not check_environment():
        sys.exit(1)


def numbers(text: str) -> list[int]:
    """A comma-separated list of whole numbers."""
    return [int(part) for part in text.split(",")]


def names(text: str) -> list[str]:
    """A comma-separated list of names."""
    return text.split(",")


def seeded_folder(text: str) -> tuple[int, Path]:
    """A seed and a folder, as 1=runs/rarl-1-out."""
    seed, _, folder = text.partition("=")
    return int(seed), Path(folder)


def prices(text: str) -> list[float]:
    """Two prices per million tokens: in, out."""
    price_in, price_out = (float(part) for part in text.split(","))
    return [price_in, price_out]


def add_world_options(command) -> None:
    """Which world, and where its datasets lie."""
    command.add_argument("--world", default="pocket", help="pocket or paper")
    command.add_argument("--data", type=Path, help="local root of the paper world's datasets")


def add_run_options(command) -> None:
    """The options of `exam` and `sweep` about how they run."""
    command.add_argument("--engine", default="torch", help="torch, vllm, openai or replay")
    command.add_argument("--log", type=Path, help="folder of run logs; a run found there goes on")
    command.add_argument("--workers", type=int, help="processes; by itself as many as pay")
    command.add_argument("--dtype", help="float32 or float64; the world's own for tables")
    command.add_argument("--progress", type=float, default=10.0,
                         help="seconds between progress lines on standard error; 0 for none")


def add_engine_options(command) -> None:
    """The options of `exam` that choose who answers."""
    add_run_options(command)
    command.add_argument("--base-url", help="openai: address of the server, up to /v1")
    command.add_argument("--api", default="completions",
                         help="openai: completions (token ids, as vLLM serves them) or chat")
    command.add_argument("--key-variable", default="OPENAI_API_KEY",
                         help="openai: environment variable that holds the API key")
    command.add_argument("--concurrency", type=int, default=8, help="openai: requests at a time")
    command.add_argument("--retries", type=int, default=4, help="openai: further tries")
    command.add_argument("--timeout", type=float, default=120.0, help="openai: seconds a try")
    command.add_argument("--price", type=prices, default=[0.0, 0.0],
                         help="openai: per million tokens, in and out, as 0.15,0.60")


def build_parser() -> argparse.ArgumentParser:
    """The parser of all commands."""
    parser = argparse.ArgumentParser(prog="python -m roi_lib", description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(required=True, metavar="command")

    def add(group, name, run):
        command = group.add_parser(name, help=run.__doc__.splitlines()[0],
                                   formatter_class=argparse.ArgumentDefaultsHelpFormatter)
        command.set_defaults(run=run)
        return command

    command = add(commands, "exam", exam)
    command.add_argument("--world", default="pocket", help="pocket or paper")
    command.add_argument("--methods", type=names, default=["base"],
                         help="comma-separated; all: every one whose checkpoint is there")
    command.add_argument("--budgets", type=numbers, help="tokens, comma-separated; the world's own")
    command.add_argument("--exams", type=int, default=512, help="number of papers")
    command.add_argument("--problems-per-exam", type=int, default=3, help="problems a paper")
    command.add_argument("--tiers", type=names, help="a tier a problem, comma-separated, instead")
    command.add_argument("--temperature", type=float, default=1.0, help="0 is greedy")
    command.add_argument("--seed", type=int, default=0, help="of papers, sampling and bootstrap")
    command.add_argument("--model", help="checkpoint folder or hub id instead of the method's own")
    command.add_argument("--data", type=Path, help="local root of the paper world's datasets")
    command.add_argument("--problems", type=Path, help="JSON Lines of {problem, answer, tier}")
    command.add_argument("--papers", type=Path, help="sit this manifest's papers, with its seed")
    command.add_argument("--write-papers", type=Path, help="write the papers' manifest (JSON)")
    command.add_argument("--samples", type=int, default=4,
                         help="attempts a problem behind the method optimal, a multiple of 4")
    command.add_argument("--tokenizer", help="folder or hub id, where it is not the checkpoint's")
    add_engine_options(command)
    command.add_argument("--out", type=Path, help="JSON file for the records")
    command.add_argument("--save", type=Path, help="folder for records and rollouts, compact")
    command.add_argument("--plot", type=Path,
                         help="picture (PNG): what each method earned and lost, where the rational "
                              "one is among them; else where the first one's tokens went")

    command = add(commands, "sweep", sweep)
    command.add_argument("sweep", help="budget, problems, mix or temperature")
    command.add_argument("--world", default="pocket", help="pocket or paper")
    command.add_argument("--methods", type=names, default=["base"],
                         help="comma-separated; all: every one whose checkpoint is there")
    command.add_argument("--exams", type=int, default=256, help="papers a setting")
    command.add_argument("--seed", type=int, default=0, help="of papers, sampling and bootstrap")
    command.add_argument("--data", type=Path, help="local root of the paper world's datasets")
    add_run_options(command)
    command.add_argument("--out", type=Path, required=True, help="CSV file")

    command = add(commands, "osmckp", osmckp)
    command.add_argument("instance", type=Path, help="JSON file")

    stages = commands.add_parser("train", help="Train a stage.").add_subparsers(
        required=True, metavar="stage")
    command = add(stages, "pretrain", train_pretrain)
    command.add_argument("--world", default="pocket", help="a world of generated problems")
    command.add_argument("--steps", type=int, help="optimizer steps; the recipe's own")
    command.add_argument("--seed", type=int, default=0, help="of weights and data")
    command.add_argument("--work", type=Path, default=Path("runs/pretrain"),
                         help="training state and log; a run found there is continued")
    command.add_argument("--out", type=Path, default=Path("data/pocket-base"), help="checkpoint")
    command = add(stages, "mft", train_mft)
    add_world_options(command)
    command.add_argument("--model", help="checkpoint to start from; the world's base")
    command.add_argument("--engine", default="torch", help="samples the answers: torch or vllm")
    command.add_argument("--set", action="append", default=[], metavar="NAME=VALUE",
                         help="change the recipe, for example samples=4; may be repeated")
    command.add_argument("--work", type=Path, default=Path("runs/mft"),
                         help="samples, log and states; a run found there is continued")
    command.add_argument("--out", type=Path, help="checkpoint; data/WORLD-mft")
    command = add(stages, "rarl", train_rarl)
    add_world_options(command)
    command.add_argument("--model", help="checkpoint to start from; the world's MFT model")
    command.add_argument("--set", action="append", default=[], metavar="NAME=VALUE",
                         help="change the recipe, for example steps=120, budgets=64,128 or "
                         "trl.rows_at_once=2; may be repeated")
    command.add_argument("--seed", type=int, default=0, help="of papers, orders and rollouts")
    command.add_argument("--papers", type=int, default=2_000,
                         help="unseen papers behind the card")
    command.add_argument("--engine", default="torch",
                         help="samples the rollouts: torch; with TRL's trainer also colocate "
                         "(vLLM in the same process) or server")
    command.add_argument("--vllm-url", help="server: address of a running `trl vllm-serve`")
    command.add_argument("--work", type=Path, default=Path("runs/rarl"),
                         help="log, states, responses; a run found there is continued")
    command.add_argument("--out", type=Path, help="checkpoint; data/WORLD-rarl")
    command = add(stages, "ablations", train_ablations)
    add_world_options(command)
    command.add_argument("--variants", type=names, default=[], help="comma-separated; all")
    command.add_argument("--set", action="append", default=[], metavar="NAME=VALUE",
                         help="change the recipe of all; steps=120 and exams=8 unless set")
    command.add_argument("--seed", type=int, default=0, help="of papers, orders and rollouts")
    command.add_argument("--papers", type=int, default=400, help="unseen papers to measure on")
    command.add_argument("--jobs", type=int, default=2, help="runs at a time")
    command.add_argument("--threads", type=int, default=1, help="threads of each run")
    command.add_argument("--work", type=Path, default=Path("runs/ablations"),
                         help="what the runs keep; the same command goes on where it stopped")
    command.add_argument("--out", type=Path, default=Path("data/ablations.csv"),
                         help="the table; the runs' logs go into a folder of that name")
    command = add(stages, "tokenizer", train_tokenizer)
    add_world_options(command)
    command.add_argument("--out", type=Path, help="folder; the world's own below data/")

    benches = commands.add_parser("bench", help="Measure side by side.").add_subparsers(
        required=True, metavar="what")
    command = add(benches, "osmckp", bench_osmckp)
    command.add_argument("--out", type=Path, help="JSON file")
    command = add(benches, "generation", bench_generation)
    command.add_argument("--out", type=Path, help="JSON file")

    command = add(benches, "rarl", bench_rarl)
    command.add_argument("--out", type=Path, help="JSON file")

    command = add(commands, "diagnose", diagnose)
    command.add_argument("log", type=Path, help="log.csv of a RARL run")

    command = add(commands, "moments", moments)
    add_world_options(command)
    command.add_argument("--work", type=Path, nargs="+", default=[Path("runs/rarl")],
                         help="the --work of `train rarl`, which holds the kept models; several, "
                         "where a shorter run of the same recipe kept more of the beginning")
    command.add_argument("--papers", type=int, default=200, help="unseen papers, in all orders")
    command.add_argument("--seed", type=int, default=1, help="of papers and sampling")
    command.add_argument("--out", type=Path, required=True, help="JSON file")

    command = add(commands, "seeds", seeds)
    command.add_argument("checkpoints", type=seeded_folder, nargs="+", metavar="SEED=FOLDER",
                         help="checkpoints of `train rarl`, as 0=data/pocket-rarl 1=runs/rarl-1")
    command.add_argument("--out", type=Path, required=True,
                         help="the table (CSV); the runs' logs go into a folder of that name")

    add(commands, "doctor", doctor)
    return parser


def main(arguments: list[str] | None = None) -> None:
    """Run one command."""
    args = build_parser().parse_args(arguments)
    try:
        args.run(args)
    except (ValueError, OSError, ModuleNotFoundError, FloatingPointError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
