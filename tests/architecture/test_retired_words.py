"""Retired words: private terms that have a standard equivalent do not come back.

The search covers code (names, comments, docstrings, messages), documentation, and the names of test functions. Terms
that stay are defined in docs/glossary.md. Names in old files and recipes are exempt where they are quoted (`"holes"`),
because readers accept them.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]

UNQUOTED = r"(?<![\"'`.])\b{}\b(?![\"'`])"
"""A word that is not a name in quotes: keys of old files and recipes are read under their old names."""


def unquoted(word: str) -> str:
    """The pattern of a word outside of quotes."""
    return UNQUOTED.format(word)


def name(*classes: str) -> str:
    """The pattern of classes whose names are also English words: only where they are defined or used as names."""
    names = "|".join(classes)
    return rf"\bclass (?:{names})\b|\b(?:{names})(?=[(\[\]|])|(?:: |-> )(?:{names})(?= =|[,):])"


RETIRED: dict[str, str] = {
    # Distributed training
    r"\b(?:is_share|share_out|own_part|trained_shares|write_shares)\b": "shard",
    r"\bshares? of (?:the|a|every|each|its|their|all)? ?(?:base|weights?|model|gradients?|moments?|parameters?)\b":
        "shard, local shard",
    r"\b(?:share|shares|shared|sharing) out\b": "shard, distribute",
    r"\b(?:FSDP|fsdp)'?s? shares\b": "shards",
    r"\b(?:put|puts|putting) (?:them |it |weights |tensors |shares |all )?together\b":
        "gather, all-gather, concatenate",
    r"\bput_together\b": "gather",
    r"\bparted\b": "resharded, split",
    r"\b(?:surroundings|with_whole_\w+|held_by_one)\b": "non-block parameters; unsharded",
    r"\bstands? around (?:the|its) blocks\b": "non-block parameters",
    r"\b(?:told_by_main|said_by_\w+|help_save|chosen_run|choose_run)\b": "broadcast, all_gather, publish",
    r"\brefuse_disagreement\b": "check_same_on_all_ranks",
    r"\bsupervisors?\b|\bsupervises?\b|\bsupervised process(?:es)?\b|\bis_supervised\b": "launcher",
    name("Meeting", "Ending"): "RendezvousConfig, RankExit",
    # Memory and the plan
    unquoted("holes"): "fragmentation",
    r"\bHOLES_\w+|\bNO_HOLES\b": "fragmentation",
    r"\b(?:foreseen|foresees?|foreseen_peak)\b": "estimated",
    unquoted("toil"): "FLOPs",
    r"\b(?:StandIns?|stand-ins?|stand_ins?)\b": "FakeQuantizer, fake layer, substitute",
    r"\b(?:held_bytes|kernels_bytes|cuda_card)\b": "rss_bytes, matmul_workspace_bytes, local_gpu",
    r"\bgives? back (?:the |its |free |freed )?(?:memory|pages|heap)\b|\bgive_back\b":
        "return memory to the system, trim_heap",
    r"\bFreedMemory\b": "HeapTrimmer",
    r"\b(?:graphics|GPU) cards?\b|\bcards? with \d|\bcard's (?:stated )?(?:speed|memory|rate)\b": "GPU",
    r"\bstep_is_too_large\b": "oom_error_with_hints",
    r"\blook_at\b|" + name("Survey"): "inspect_dataset, DatasetSummary",
    r"\bnumbers that train\b|\btrained numbers\b": "trainable parameters",
    r"\bsettle_allocator\b|\bstarts? the process anew\b": "re-execute with another allocator",
    unquoted("rehears(?:al|als|e|es|ed|ing)"): "dry run",
    r"\b(?:rehearse_alone|_?Rehearsed)\b": "dry_run_only, DryRunPassed",
    # Numeric code
    r"\bremade\b|\b(?:re)?made again\b|\bcomputed? again\b|\bcomputes again\b|\bcompute_again\b": "recompute",
    r"\b(?:can_be_made|keeping_little|keeping_all)\b": "recomputable, saving_inputs_only",
    r"\bwidening[ _]layers?\b": "up projections",
    r"\bgated units?\b": "gated MLP",
    r"\bke(?:ep|eps|pt|eping)[ _]apart\b": "packing isolation, no cross-contamination",
    r"\b(?:prove_separation|separation_error)\b": "check_no_cross_contamination",
    r"\bbegins? with alike\b|\bbegin alike\b|\b(?:prompts?|prefix(?:es)?|tokens) in common\b": "shared prefix",
    r"\b(?:has|have) (?:the )?(?:most |\w+ of (?:its|their) tokens )?in common(?= with\b)": "shared prefix",
    r"\b(?:may_share_prefixes|objection_to_sharing|joins_rows)\b": "supports_prefix_sharing",
    r"\b(?:rows?|tokens|examples) (?:in|of) (?:one|a) line\b|\bin (?:one|a) line of tokens\b"
    r"|\bjoined rows\b|\brows are joined\b": "packed, flattened",
    r"\b(?:own_bounds|seen_bounds|bounds_of|longest_own|longest_seen)\b": "cu_seqlens, max_seqlen",
    r"\bchances\b|\blog[ _]chances?\b": "probabilities, log-probabilities",
    r"\blikeliest\b|\bleast likely token\b": "top-1, argmax",
    r"\bskeletons?\b|\btold_as_ours\b": "meta model",
    r"\bhollow(?:ed|s)?\b|\bhollow_out\b": "placeholder, meta",
    r"\bmultiplies matrices\b": "matmul",
    r"\b(?:base|low-rank|matrix|adapted|measuring) products?\b|\bproducts (?:take|need|keep|reach|are \d)\b": "matmul",
    r"\brefuse_(?:other_codes|endless_template)\b|\bwrite_shallow\b|\bshrunk (?:model|recipe)\b":
        "truncated model; check_*",
    # Adapters, merge and export
    r"\b_?takes?_over\b|\btak(?:es?|en) over (?:an?|the|its|their|earlier)\b": "load, initialize from",
    r"\bput[ _]on\b(?= (?:a|the|it|its|them|any|another)\b)|\b(?:is|are|was|were) put on\b|\bput_on\b": "attach, load",
    r"\b(?:is|are|was|taken|takes?|took|taking) (?:it |them )?off without\b|\bwithout a trace\b": "detach, unload",
    unquoted("fold(?:ed|able|s|ing)(?!: bool| element| section)") + r"|\bfold_quantized\b|\bwrite_folded\w*": "merge",
    r"\bbake[sd]?\b|\bbaking\b|\bBakedPrompt\b": "export the prompt as tokens",
    unquoted("certificates?"): "verification report",
    r"\bproof_rows\b|\bPROOF_TOKENS\b|\bCERTIFICATES\b": "verification_rows",
    r"\b(?:a |the )?proof of (?:a|the) merge\b|\bmerge's proof\b": "verification",
    r"\banchored\b|\bAnchoredLinear\b": "resolved (path), DifferenceLinear",
    r"\bpooled\b|\bPooledLinear\b|\bpooled_factors\b": "grouped, group-averaged",
    r"\b(?:Pooled)?ElasticLinear\b": "IecLinear, GroupedIecLinear",
    r"\b(?:adapted_product|plain_product|plain_update|base_lengths|rate_factor)\b":
        "lora_linear, base_row_norms, lr_multiplier",
    r"\bPromptedModel\b|\bprompted models?\b": "SoftPromptModel",
    r"\bcombine_folders\b|\bCombineResult\b|" + name("Combination"): "merge_weights, WeightMerge",
    # Data
    r"\btrained tokens?\b|\btokens that (?:are )?train(?:ed)?\b": "target tokens",
    unquoted("doubles"): "duplicates",
    r"\brows? (?:that )?(?:is |are |was |were |be )?left out\b|\bleaves? out (?:a |the )?rows?\b|\bleft_out\b":
        "dropped",
    unquoted("(?:on_)?untrainable"): "without target tokens",
    unquoted("ledgers?(?!: dict)"): "data report",
    r"\b(?:StoredSource|StoreWriter)\b|" + name("Fitting"): "TokenizedSource, TokenStoreWriter, Truncation",
    r"\bheld[- ]out (?:loss|losses|rows?|messages|questions|bookings|paragraphs|conversations|set|data|prompts?)\b":
        "validation loss, validation rows",
    unquoted("(?:HeldOutLoss|held_out_(?:loss|step|before|rows|scores)|HELD_OUT_SHARE)"): "validation",
    # Evaluation and generation
    r"\bkept results?\b|\bKeptResults\b": "prediction cache",
    r"\bwhat was said\b|\bwhat (?:it|a model|the model|each) (?:says|said)\b|\bwords to come\b":
        "output, prediction, generation",
    unquoted("(?:answers_by|OwnWriter|VllmWriter|is_verdict|in_conversation)"):
        "generation_backend, ModelGenerator, is_binary, uses_chat_template",
    # Jobs and events
    r"\bWorkbench\b|\bbench\.(?:load_base|seed|read_data|folder)\b|\bLateBase\b": "TrainingContext",
    name("Ready", "Tuned", "Named", "TrainedRun", "TrainedRecord"):
        "PreparedRun, FineTunedModel, ModelRef, FineTunedRun",
    name("Examiner", "Saver", "Recorder", "RankRecorder", "Patience", "Symptoms"):
        "Evaluator, CheckpointManager, MetricsLogger, EarlyStopping, TrainingDiagnostics",
    name("BestKept", "Warned", "Sampled", "Validated", "RunFacts"):
        "BestCheckpoint, TrainingWarning, SampleGenerated, ValidationResult, RunMetadata",
    r"\bcourse of (?:a|the|its) (?:run|loss|training)\b|\ba run's course\b|\bas a course\b": "training curves, history",
    r"\blikely_aim\b|\bfirst_recipe\b|" + name("Aim"): "objective, starter_recipe",
    r"\bgo(?:es|ing|ne)? on with\b|\b(?:runs?|it|training|sweeps?|evaluation) goes on\b"
    r"|\bgo on (?:from|where)\b|\bgone on\b":
        "resume, continue",
    r"\bhow_to_resume\b": "resume_command",
    r"\brefuse_taken_over\b|\b_?Circumstances\b|\b_AT_ONCE\b": "load_initial_adapter, _ForwardContext, _CHUNK",
    r"\bmends?\b|\bmended\b|\bmending\b": "fix",
    r"\bremed(?:y|ies)\b": "fix, hint",
    r"\btwins?\b": "reference implementation",
    r"\brivals?\b|\brivals?'": "other tools, baseline",
    r"\brooms\b|\bwhich room\b|\brules of the house\b|\bhouse rules\b": "package, layer",
    r"\bharmless\(|\b_?harmless_\w+": "sanitize",
    r"\b(?:is|are|was|were|be) told (?:by|of|at|with|that|about|as|in|which|what|from|all)\b":
        "log, emit, report, pass",
    r"\b(?:tells|told) (?:it|them|us|the user|the others|everyone)\b": "log, emit, report, pass",
    r"\bmade of\b(?= (?:it|them)\b)": "made from",
    r"\b(?:this|that) is what\b|\bis what (?:it|they|a|the)\b": "name the subject",
}  # fmt: skip
"""A regular expression of each retired term, with the standard words that replace it. A space matches any
white space, a line break in a comment included."""

TEST_NAME_STARTS = (
    "it", "its", "they", "their", "them", "so", "that", "this", "these", "those", "of", "who", "whose", "what", "where",
    "a", "an", "the", "no", "one", "such", "each", "nothing",
)  # fmt: skip
"""First words of a test's name that do not name its subject."""

PATTERNS = {re.compile(pattern.replace(" ", " +")): word for pattern, word in RETIRED.items()}

HIDDEN_SUBJECT = re.compile(
    r"""(?:^|\. |\"{3}|\# )What (?!if\b|happens\b)[a-z, ]{2,60} (?:is|are|was|were)\b""", re.MULTILINE
)
"""A sentence whose subject is a clause: "What rows begin with is ..." for "The shared prefix is ..."."""


EARLIER_TABLE = re.compile(r"^EARLIER_\w+ = \{.*?\}$", re.MULTILINE | re.DOTALL)
"""A table of names that earlier versions wrote to disk: it must hold them."""


def without_earlier_names(text: str) -> str:
    """The code without such tables; every line keeps its number."""
    return EARLIER_TABLE.sub(lambda found: "\n" * found[0].count("\n"), text)


def on_one_line(text: str) -> str:
    """The text with line breaks, indents and comment signs as spaces; every character keeps its position."""
    return re.sub(r"\n[ \t]*\#?|\s", lambda found: " " * len(found[0]), text)


def searched() -> list[Path]:
    """Code and documentation, without the changelog, whose entries are history."""
    code = [file for folder in ("cli", "finetune") for file in (ROOT / folder).rglob("*.py")]
    pages = [*(ROOT / "docs").rglob("*.md"), *(ROOT / "docs" / "guides").glob("*.md")]
    return sorted([*code, *pages, *(ROOT / name for name in ("README.md", "CONTRIBUTING.md", "recipes/README.md"))])


def retired_in(text: str) -> Iterator[tuple[int, str, str]]:
    """Line, found text and standard words of each retired term."""
    text = without_earlier_names(text)
    flat = on_one_line(text)
    found = [(match, word) for pattern, word in PATTERNS.items() for match in pattern.finditer(flat)]
    found += [(match, "a subject that is a noun") for match in HIDDEN_SUBJECT.finditer(text)]
    for match, word in found:
        yield text.count("\n", 0, match.start()) + 1, " ".join(match[0].split()), word


def test_functions() -> Iterator[tuple[str, int, str]]:
    """File, line and name (without `test_`) of every test."""
    for file in sorted((ROOT / "tests").rglob("test_*.py")):
        for number, line in enumerate(file.read_text(encoding="utf-8").splitlines(), 1):
            if found := re.match(r"\s*(?:async )?def test_(\w+)", line):
                yield str(file.relative_to(ROOT)), number, found[1]


test_functions.__test__ = False  # type: ignore[attr-defined]  # a helper whose name starts like a test


def test_code_and_documentation_have_no_retired_words():
    found = [
        f"{file.relative_to(ROOT)}:{line}: {text} -> {word}"
        for file in searched()
        for line, text, word in retired_in(file.read_text(encoding="utf-8"))
    ]
    assert not found, f"{len(found)} retired words:\n" + "\n".join(found)


def test_test_names_have_no_retired_words():
    found = [
        f"{file}:{line}: {text} -> {word}"
        for file, line, name in test_functions()
        for _, text, word in retired_in(name.replace("_", " "))
    ]
    assert not found, f"{len(found)} retired words:\n" + "\n".join(found)


def test_test_names_start_with_their_subject():
    found = [
        f"{file}:{line}: test_{name}"
        for file, line, name in test_functions()
        if name.partition("_")[0] in TEST_NAME_STARTS
    ]
    assert not found, f"{len(found)} names:\n" + "\n".join(found)


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("a shard\nand share_out(model)", 2),
        ("def f():\n    # memory of\n    # trained\n    # tokens", 3),
        ("The certificate is written.", 1),
        ("What rows of a batch begin with alike is computed once.", 1),
        ("the held-out\nloss", 1),
    ],
)
def test_retired_words_in_a_text_are_found_with_their_line(text: str, line: int):
    assert line in {number for number, _, _ in retired_in(text)}


@pytest.mark.parametrize(
    "text",
    [
        'parts.get("holes", 0)  # plans of older versions',
        'EARLIER_TITLES = {\n    "the held-out loss rises": "the validation loss rises",\n}',
        "the model card, a hand of cards and a house",
        "the shared prefix of two rows",
        "a shareable file in a folder",
        "a dry run of the launcher",
        "What happens when a disk is full?",
    ],
)
def test_standard_words_are_not_found(text: str):
    assert not list(retired_in(text))
