"""ROI-Reasoning on the command line: exams, training, and what belongs to them.

Example: python -m roi_lib exam --methods base,mft,rarl --budgets 64,128"""

import json
import sys
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Literal, get_args

import tyro

from roi_lib import worlds
from roi_lib.exams import draw_papers
from roi_lib.experiments.estimate import ASSUMED, Assumed
from roi_lib.problems import SPLITS
from roi_lib.store import files, papers, sources
from roi_lib.store.deadline import Deadline, OutOfTime
from roi_lib.training.recipes import PretrainRecipe
from roi_lib.worlds import ORDERS, World, check_choice, get_world

Omit = tyro.conf.OmitArgPrefixes  # a recipe's fields are options of their own
Positional = tyro.conf.Positional
REGISTRY = tyro.constructors.ConstructorRegistry()


@REGISTRY.primitive_rule
def read_list(info):
    """A list of numbers or words given as 64,128 or as 64 128: how tyro reads and shows it."""
    kind, *more = get_args(info.type) or [None]  # of a tuple, or of typing's Tuple
    spec = tyro.constructors.PrimitiveConstructorSpec
    return None if kind not in (int, str) or more != [...] else spec(
        nargs="*", metavar="A,B,...",
        instance_from_str=lambda words: tuple(kind(w) for w in ",".join(words).split(",") if w),
        is_instance=lambda x: isinstance(x, tuple) and all(isinstance(v, kind) for v in x),
        str_from_instance=lambda x: [",".join(map(str, x))])


@dataclass(frozen=True)
class Run:
    """Which world and methods, on how many papers, and how they run."""

    world: str = "pocket"  # pocket (runs anywhere), small or paper (real datasets, Qwen2.5)
    methods: tuple[str, ...] = ("base",)  # all: every one whose checkpoint is there
    exams: int = 512  # number of papers, drawn from the test split
    seed: int = 0  # of papers, sampling and bootstrap
    data: Path | None = None  # local folder with the paper world's datasets under their hub ids
    engine: Literal["torch", "vllm", "openai", "replay"] = "torch"  # replay: from --log alone
    dtype: str | None = None  # of the weights, as bfloat16; the world's own for tables
    workers: int | None = None  # processes; as many as pay
    log: Path | None = None  # folder of run logs; a run found there goes on
    progress: bool = True  # progress bars on standard error
    minutes: float | None = None  # stop after so many (exit status 75); the --log goes on


@dataclass(frozen=True)
class ExamRun(Run):
    """What is sat, by whom, and where it is written."""

    budgets: tuple[int, ...] = ()  # hard budgets in tokens; the world's own. Example: 64,128
    orders: tuple[str, ...] = ORDERS  # of the papers; easy is always sat: Regret needs it
    temperature: float = 1.0  # of sampling; 0 is greedy
    problems_per_exam: int = 3  # problems a paper, tiers in turn
    tiers: tuple[str, ...] = ()  # a tier a problem instead. Example: easy,hard,hard
    samples: int = 4  # attempts a problem and effort behind bounds and rules, a multiple of 4
    model: str | None = None  # folder, hub id or id@revision for all methods
    tokenizer: str | None = None  # folder or hub id, where it is not the checkpoint's own
    problems: Path | None = None  # your own: JSON Lines of {"problem", "answer", "tier"}
    papers: Path | None = None  # sit the papers of this list (JSON), with its seed
    write_papers: Path | None = None  # write the list of the papers' ids, for somebody else
    # openai: address of a server, up to /v1; given several times, they share the work
    base_url: tyro.conf.UseAppendAction[list[str]] = field(default_factory=list)
    api: Literal["completions", "chat"] = "completions"  # openai: token ids, or messages
    key_variable: str = "OPENAI_API_KEY"  # openai: environment variable with the API key
    concurrency: int = 8  # openai: requests at a time, per server
    retries: int = 4  # openai: further tries after a failure
    timeout: float = 120.0  # openai: seconds a try, whatever has come
    # openai: rename a parameter of requests (max_tokens=max_completion_tokens), drop one (seed=),
    # add one (reasoning_effort=low); may be given several times
    request: tyro.conf.UseAppendAction[list[str]] = field(default_factory=list)
    price: tuple[float, float] = (0.0, 0.0)  # openai: per million tokens, in and out
    details: bool = False  # print every order with all its intervals
    out: Path | None = None  # CSV file for the records
    save: Path | None = None  # folder for records and rollouts, small enough to keep
    plot: Path | None = None  # PNG: earned and lost; without bounds, where the tokens went


def exam_papers(args: ExamRun, world: World):
    """The papers that the options name, and their list, with its split and its seed."""
    listed = papers.read_paper_list(args.papers) if args.papers else None
    if listed and listed.world != world.name:
        raise ValueError(f"{args.papers} holds papers of the world {listed.world}; "
                         f"give --world {listed.world}")
    split, seed = (listed.split, listed.seed) if listed else ("test", args.seed)
    pool = (sources.load_jsonl(args.problems, world) if args.problems
            else sources.load_pool(world, split, args.data))
    drawn = papers.restore_papers(listed, pool) if listed else draw_papers(
        world, args.exams, args.problems_per_exam, split, seed, pool, args.tiers or None)
    return drawn, papers.make_paper_list(world, drawn, split, seed)


def engine_of(args: Run, world: World):
    """Which engine the options name; its arithmetic is the world's for tables, unless they say."""
    from roi_lib.engines import EngineConfig
    server = ("base_url", "api", "key_variable", "concurrency", "retries", "timeout", "request")
    options = {name: value for name, value in vars(args).items()
               if name in server and args.engine == "openai"}
    dtype = args.dtype or (world.table_dtype if args.engine == "torch" else None)
    return EngineConfig(args.engine, options, args.log, args.progress, dtype,
                        Deadline.after(args.minutes))


def exam(args: Omit[ExamRun]) -> None:
    """Let methods take exams under hard token budgets, and compare them.

    Example: python -m roi_lib exam --methods base,mft,rarl,best_rule,optimal"""
    from roi_lib.experiments import methods, table
    for path, option in ((args.out, "--out"), (args.write_papers, "--write-papers"),
                         (args.plot, "--plot")):
        if path:
            files.check_file(path, option)
    for order in args.orders:
        check_choice("order", order, ORDERS)
    if args.save:
        files.check_replaceable(args.save)
    world = get_world(args.world)
    names, (sat, listed) = methods.find_methods(world, args.methods), exam_papers(args, world)
    if args.write_papers:
        files.write_json(args.write_papers, asdict(listed))
    comparison = methods.Comparison(
        world, sat, listed.seed, args.temperature, args.model, args.tokenizer,
        engine_of(args, world), args.samples,
        tuple(order for order in ORDERS if order in (*args.orders, "easy")))
    results = methods.run_methods(comparison, names, args.budgets or world.budgets, args.workers)
    report(args, results, len(sat))
    records, order = table.make_records(comparison, results), comparison.orders[-1]
    print(f"{order} order, {len(sat)} papers, seed {listed.seed}, temperature {args.temperature:g}"
          f"; in brackets 95 % intervals\n\n{table.show_order(records, order)}\n")
    print(table.show_details(records) if args.details else "--details prints the other orders")
    if args.out:
        files.write_csv(args.out, records.round(6))
    if args.save:
        table.save_comparison(args.save, comparison, results, records, listed.split)
    if args.plot:
        from roi_lib.teaching import plots
        plots.use_style()
        first = records[records["method"] == records["method"].iloc[0]]
        figure = (plots.score_split(records, int(records["budget"].min()))
                  if "bound_statement" in records else plots.tokens_by_position(first))
        figure.savefig(args.plot, format="png", metadata={"Software": "roi_lib"})
    wrote = [str(path) for path in (args.write_papers, args.out, args.save, args.plot) if path]
    print("wrote " + ", ".join(wrote) if wrote else "--out, --save and --plot write all of it")


def report(args: ExamRun, results, n_exams: int) -> None:
    """What a server charged, what failed, and why there are no intervals. `ValueError`: all of it
    failed, so there is no Score."""
    for (method, budget), usage in results.usage.items():
        print(f"{method}, {budget} tokens: {usage.report(*args.price)}")
    if n_exams == 1:
        print("note: one exam has no interval; give --exams 2 at least", file=sys.stderr)
    rows = results.table[results.table["position"] == 1] if len(results.table) else results.table
    if len(rows) and (failed := rows["failed"][rows["failed"] != ""]).any():
        if len(failed) == len(rows):
            raise ValueError(f"every response failed, so there is no Score: {failed.mode()[0]}")
        remedy = "run the same command again" if args.log else "use --log to keep the others"
        print(f"warning: {len(failed)} of {len(rows)} responses failed and count in no number, "
              f"most often: {failed.mode()[0]}; {remedy}", file=sys.stderr)


def sweep(what: Positional[str], out: Path, args: Omit[Run]) -> None:
    """Compare methods along one thing: problems, mix or temperature; into a CSV file.

    Example: python -m roi_lib sweep problems --methods base,mft,rarl --out problems.csv"""
    from roi_lib.experiments import methods, table
    files.check_file(out)
    world = get_world(args.world)
    found = table.run_sweep(world, what, methods.find_methods(world, args.methods), args.exams,
                            args.seed, sources.load_pool(world, "test", args.data),
                            engine_of(args, world), args.workers)
    files.write_csv(out, found)
    print(f"wrote {out}: {len(found)} rows")


def osmckp(instance: Positional[Path]) -> None:
    """Solve one instance of OS-MCKP exactly, from a JSON file.

    Example: python -m roi_lib osmckp INSTANCE.json"""
    from roi_lib.experiments import knapsack
    print(json.dumps(knapsack.solve_document(knapsack.read_instance(instance)), indent=1))


def diagnose(log: Positional[Path]) -> None:
    """Say why a run of RARL does not learn, from its log.csv.

    Example: python -m roi_lib diagnose data/pocket-rarl/log.csv"""
    from roi_lib.experiments import diagnosis
    print(diagnosis.report(diagnosis.diagnose(log)))


def counterfactuals(out: Path, models: tuple[str, ...] = ("mft", "rarl"), world: str = "pocket",
                    papers: int = 400, seed: int = 1, samples: int = 8) -> None:
    """The same papers with one thing changed: do models (methods, or NAME=FOLDER) do otherwise?

    Example: python -m roi_lib counterfactuals --models mft,rarl --out counterfactuals.csv"""
    from roi_lib.experiments import counterfactuals
    files.check_file(out)
    files.write_csv(out, counterfactuals.compare(get_world(world), models, papers, seed, samples))
    print(f"wrote {out}")


def merge(adapters: Positional[str], out: Positional[Path]) -> None:
    """Write adapters and their base as one checkpoint, for vLLM and others.

    Example: python -m roi_lib merge data/small-mft runs/small-mft-merged"""
    from roi_lib.store.checkpoints import merge_adapters
    merge_adapters(adapters, out)
    print(f"wrote {out}")


def estimate(assumed: Omit[Assumed], mft: worlds.MFTRecipe, rarl: worlds.RARLRecipe,
             world: str = "pocket", device: str = "cpu2", model: str | None = None,
             work: Path | None = None, out: Path | None = None) -> None:
    """What a world's recipes cost on cpu2, t4, 4090, a100 or h100: tokens, FLOPs, memory, hours.

    Example: python -m roi_lib estimate --world paper --device 4090"""
    from roi_lib.experiments import estimate as estimates
    from roi_lib.training.costs import DEVICES, parameters
    if out:
        files.check_file(out)
    check_choice("device", device, DEVICES)
    its = replace(get_world(world), mft=mft, rarl=rarl)
    name = model or its.method("base").checkpoint
    given = its, estimates.shape_of(name), DEVICES[device], assumed
    table, too_large = estimates.estimate(*given)
    compared = estimates.compare(work, *given) if work else None
    means = ", ".join(f"{key} {value}" for key, value in asdict(assumed).items())
    print(f"{name} ({parameters(given[1]):,} parameters) on {device}\nassumed: {means}\n\n"
          f"{estimates.report(table, too_large, compared)}")
    if out:
        tables = {key: json.loads(rows.to_json(orient="records"))  # NaN: null
                  for key, rows in (("stages", table), ("work", compared)) if rows is not None}
        files.write_json(out, {"world": world, "device": device, "model": name, **asdict(assumed),
                               "too_large": too_large, **tables})


def doctor() -> None:
    """Check the installation: versions, checkpoints, and how to mend what is wrong.

    Example: python -m roi_lib doctor"""
    from roi_lib.teaching.doctor import check_installation
    if not check_installation():
        sys.exit(1)


@dataclass(frozen=True)
class Stage:
    """Where a stage of training starts, works and ends."""

    world: str = "pocket"  # the recipe's defaults are that world's
    model: str | None = None  # checkpoint to start from; the world's own for this stage
    engine: str = "torch"  # samples: torch, vllm (mft); colocate, server (rarl, through TRL)
    vllm_url: str | None = None  # for engine server: address of a running `trl vllm-serve`
    papers: int = 2_000  # rarl: unseen papers behind the card
    data: Path | None = None  # local folder with the paper world's datasets
    work: Path | None = None  # log and states, runs/STAGE; a run found there goes on
    minutes: float | None = None  # stop at the first checkpoint after so many, with exit status 75
    out: Path | None = None  # the checkpoint; data/WORLD-STAGE

    def folders(self, stage: str) -> tuple[Path, Path]:
        """Where the checkpoint goes, and where the run lives."""
        return self.out or Path(f"data/{self.world}-{stage}"), self.work or Path(f"runs/{stage}")


def tokenizer(stage: Omit[Stage]) -> None:
    """Make a world's own tokenizer, in --out or in its own folder below data/.

    Example: python -m roi_lib train tokenizer --out runs/tokenizer"""
    from roi_lib.store.tokenizers import make_tokenizer
    world = get_world(stage.world)
    make_tokenizer(world, stage.out or files.DATA / world.tokenizer, stage.data)


def pretrain(recipe: Omit[PretrainRecipe], stage: Omit[Stage]) -> None:
    """Pre-train the base model of a world of generated problems, about an hour.

    Example: python -m roi_lib train pretrain --steps 400 --work runs/short --out runs/base"""
    from roi_lib.training.pretrain import pretrain
    pretrain(get_world(stage.world), *stage.folders("base"), recipe)


def mft(recipe: Omit[worlds.MFTRecipe], stage: Omit[Stage]) -> None:
    """Meta-Cognitive Fine-Tuning: from a base model to one that predicts levels and skips.

    Example: python -m roi_lib train mft --seed 1 --work runs/mft-1 --out runs/mft-1-out"""
    from roi_lib.training.mft import train_mft
    train_mft(get_world(stage.world), *stage.folders("mft"), recipe, stage.model, stage.engine,
              stage.data, Deadline.after(stage.minutes))


def rarl(recipe: Omit[worlds.RARLRecipe], stage: Omit[Stage]) -> None:
    """Rationality-Aware RL: from the MFT model to one that allocates its budget.

    Example: python -m roi_lib train rarl --steps 120 --budgets 64,128 --out runs/rarl-out"""
    from roi_lib.training.rarl import train_rarl
    train_rarl(get_world(stage.world), *stage.folders("rarl"), recipe, stage.model, stage.papers,
               stage.engine, stage.vllm_url, stage.data, Deadline.after(stage.minutes))


def ablations(recipe: Omit[worlds.RARLRecipe], stage: Omit[Stage], variants: tuple[str, ...] = (),
              jobs: int = 2, threads: int = 1) -> None:
    """RARL again and again with one thing changed, `jobs` at a time; a table and a folder of logs.

    Example: python -m roi_lib train ablations --variants reference,grpo --out runs/two.csv"""
    from roi_lib.experiments.ablations import ablate
    world, out = get_world(stage.world), stage.out or Path("data/ablations.csv")
    ablate(world, recipe, stage.folders("ablations")[1], out, variants, stage.papers, jobs, threads,
           tuple(sources.load_pool(world, split, stage.data) for split in SPLITS))
    print(f"wrote {out}")


def bench(what: Positional[Literal["osmckp", "generation", "rarl"]],
          out: Path | None = None) -> None:
    """Measure side by side: scipy's milp; transformers' generate and vLLM; TRL's GRPOTrainer.

    Example: python -m roi_lib bench generation --out bench.json"""
    if out:
        files.check_file(out)
    from roi_lib.experiments import benches
    result = getattr(benches, what)()
    print(json.dumps(result, indent=1))
    if out:
        files.write_json(out, result)


def commands(world: World) -> tyro.extras.SubcommandApp:
    """All commands; the defaults of the recipes of training are those of the world."""
    app, train, stage = tyro.extras.SubcommandApp(), tyro.extras.SubcommandApp(), Stage(world.name)
    train.command(partial(tokenizer, stage=stage), name="tokenizer")
    start = PretrainRecipe()
    for command, recipe in ((pretrain, start), (mft, world.mft), (rarl, world.rarl)):
        train.command(partial(command, recipe=recipe, stage=stage), name=command.__name__)
    train.command(partial(ablations, recipe=replace(world.rarl, steps=80, exams=8),
                          stage=replace(stage, papers=400)), name="ablations")
    for command in (exam, sweep, osmckp, bench, diagnose, counterfactuals, merge, doctor):
        app.command(command)
    app.command(partial(estimate, assumed=ASSUMED[world.name], mft=world.mft, rarl=world.rarl,
                        world=world.name), name="estimate")
    app.command(train, name="train", help="Train a stage: tokenizer, pretrain, mft, rarl.")
    return app


def main(arguments: list[str] | None = None) -> None:
    """Run one command; what a user can get wrong ends in one sentence and exit status 2."""
    arguments = sys.argv[1:] if arguments is None else arguments
    words = [word for argument in arguments for word in argument.split("=", 1)]
    after = dict(zip(words, words[1:], strict=False))
    try:
        commands(get_world(after.get("--world", "pocket"))).cli(
            prog="python -m roi_lib", description=__doc__, args=arguments, registry=REGISTRY,
            config=(tyro.conf.AvoidSubcommands, tyro.conf.FlagCreatePairsOff))
    except (ValueError, OSError, ModuleNotFoundError, FloatingPointError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except OutOfTime as error:
        print(f"stopped as --minutes says: {error}; the same command goes on", file=sys.stderr)
        sys.exit(75)  # sysexits.h: try again later
    except KeyboardInterrupt:
        print("interrupted; what is in a --log or --work folder is not done again", file=sys.stderr)
        sys.exit(130)


if __name__ == "__main__":
    main()
