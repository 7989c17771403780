"""python -m anymask explain: its facts are the library's own, and what is wrong with a call is said in one line."""

from __future__ import annotations

import ast
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import anymask
from anymask import block_map, causal, document, sliding_window
from anymask.blocks.build import STAGES, stages
from anymask.cli import main
from anymask.expr.emit import emit_hide
from anymask.expr.interval import Grid
from anymask.expr.ir import to_text
from anymask.expr.mods import Mods, text_of
from anymask.expr.trace import SCORE_TEXT
from anymask.kernels import map_launch
from anymask.kernels.plan import choose
from anymask.problem import Problem

FILE = """
import torch
from anymask import causal
WINDOW = 20
table = torch.arange(64) % 3 == 0
print("hello from the file")
def mine(b, h, q_idx, kv_idx):
    return (q_idx - kv_idx < WINDOW) & table[kv_idx] & (h >= 0)
a_mask = causal()
def score(s, b, h, q_idx, kv_idx):
    return s
def asks(b, h, q_idx, kv_idx):
    return True if q_idx > kv_idx else False
number = 3
"""


@pytest.fixture
def path(tmp_path: Path) -> Path:
    (tmp_path / "masks.py").write_text(FILE)
    return tmp_path / "masks.py"


def facts_of(capsys: pytest.CaptureFixture[str], *arguments: str) -> Any:
    assert main(["explain", *arguments, "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def test_facts_are_the_library_s_own(capsys: pytest.CaptureFixture[str]) -> None:
    """Of a mask with a map for each sequence, shared by its heads, with ragged tiles."""
    what = "causal() & document(torch.arange(B * Sq).view(B, Sq) // 90) & sliding_window(127, None)"
    sizes = ("--sq", "300", "--batch", "2", "--heads", "4", "--head-dim", "64", "--tile", "32x16")
    facts = facts_of(capsys, what, *sizes, "--dtype", "float16", "--arch", "sm_80")

    mask = causal() & document(torch.arange(600).view(2, 300) // 90) & sliding_window(127, None)
    blocks = block_map(mask, 2, 4, 300, 300, device="cpu", tile=(32, 16))
    mods = Mods.of(text_of(blocks.text, SCORE_TEXT), blocks.bindings.ints, blocks.bindings.floats)
    q = torch.empty(2, 4, 300, 64, dtype=torch.float16)
    plan = choose(Problem.of(q, q, q), mods, (32, 16), arch="sm_80")
    dense = mask.to_dense(2, 4, 300, 300)
    kinds = blocks.to_dense()

    assert list(facts) == [
        *("mask", "batch", "heads", "sq", "skv", "head_dim", "dtype", "arch", "expression", "captured", "tile"),
        *("map_shape", "tiles", "decided_by", "density", "visible_pairs", "visible_pairs_are_exact", "pairs"),
        *("forward_flops", "bytes", "plan", "functions", "picture"),
    ]
    assert facts["mask"] == repr(mask)
    named = ("batch", "heads", "sq", "skv", "head_dim", "dtype", "arch")
    assert [facts[key] for key in named] == [2, 4, 300, 300, 64, "float16", "sm_80"]
    assert facts["expression"] == to_text(mods.mask)
    assert facts["captured"]["tensors"] == [{"dtype": "int64", "shape": [2, 300]}]
    assert tuple(facts["captured"]["ints"]) == blocks.bindings.ints and facts["captured"]["floats"] == []
    assert (facts["tile"], facts["map_shape"]) == ([32, 16], [2, 1, 10, 19])
    assert list(facts["tiles"].values()) == [int((kinds == kind).sum()) for kind in range(3)]
    decided = stages(mods.mask, blocks.bindings, Grid(2, 1, 300, 300, (32, 16), torch.device("cpu")))
    assert list(facts["decided_by"].values()) == list(decided.values())
    assert list(facts["decided_by"]) == [name.replace(" ", "_") for name in (*STAGES, "mixed")]
    assert facts["density"] == blocks.density()
    assert facts["visible_pairs"] == int(dense.sum()) and facts["visible_pairs_are_exact"]
    assert facts["pairs"] == dense.numel()
    visited = (kinds > 0).repeat_interleave(32, 2).repeat_interleave(16, 3)[:, :, :300, :300].sum() * 4
    flops = {"dense": dense.numel(), "visited": int(visited), "visible": int(dense.sum())}
    assert facts["forward_flops"] == {name: 4 * 64 * pairs for name, pairs in flops.items()}
    assert facts["plan"]["why"] == plan.why and facts["plan"]["backend"] == "triton"
    assert plan.dkdv is not None and facts["plan"]["dkdv"]["BLOCK_KV"] == plan.dkdv.BLOCK_KV
    assert facts["functions"]["hide"] == emit_hide(mods.mask, "hide", frozenset(), plan.is_ptx)
    for name, text in facts["functions"].items():
        assert text.startswith(f"@triton.jit\ndef {name}(") and ast.parse(text)
    assert facts["picture"] == str(blocks)


@pytest.mark.parametrize("what", ["causal()", "sliding_window(100, 100)"])
def test_bytes_are_those_of_the_walks(capsys: pytest.CaptureFixture[str], what: str) -> None:
    facts = facts_of(capsys, what, "--sq", "3000", "--skv", "2000", "--tile", "64")
    mask = eval(what, vars(anymask))
    blocks = block_map(mask, 1, 1, 3000, 2000, device="cpu", tile=64)
    assert facts["bytes"]["kinds"] == blocks.kinds.nbytes
    different = {}
    for kernel, size in facts["bytes"]["walks"].items():
        config = facts["plan"][kernel]
        tile, is_kv_row = (max(64, config["BLOCK_Q"]), max(64, config["BLOCK_KV"])), kernel == "dkdv"
        different[tile, is_kv_row] = sum(part.nbytes for part in map_launch.make_walks(blocks, (tile, is_kv_row))[0])
        assert size == different[tile, is_kv_row], kernel
    assert facts["bytes"]["total"] == blocks.kinds.nbytes + sum(different.values())


def test_without_a_mask_only_dkdv_walks(capsys: pytest.CaptureFixture[str]) -> None:
    facts = facts_of(capsys, "full()", "--sq", "512", "--arch", "sm_80")
    walks = facts["bytes"]["walks"]
    assert walks["forward"] == walks["dq"] == 0 < walks["dkdv"]
    assert facts["bytes"]["total"] == facts["bytes"]["kinds"] + walks["dkdv"]


def test_the_default_tile_is_that_of_a_call(capsys: pytest.CaptureFixture[str]) -> None:
    assert facts_of(capsys, "causal()", "--sq", "512")["tile"] == [64, 64]
    facts = facts_of(capsys, "causal()", "--sq", "512", "--arch", "cpu")
    assert facts["tile"] == [128, 64]
    assert facts["plan"]["backend"] == "eager" and "cpu" in facts["plan"]["why"]
    assert facts["functions"] == {} and facts["bytes"]["walks"] == {}


def test_a_large_mask_is_estimated(capsys: pytest.CaptureFixture[str]) -> None:
    facts = facts_of(capsys, "sparse_strided(64)", "--sq", "16384", "--tile", "128")
    assert not facts["visible_pairs_are_exact"]
    q = torch.arange(16384)
    exact = int((q + 1).clamp(max=64).sum() + ((q - 64).clamp(min=-1) // 64 + 1).sum())
    assert facts["visible_pairs"] == pytest.approx(exact, rel=0.05)
    main(["explain", "sparse_strided(64)", "--sq", "16384", "--tile", "128"])
    assert "estimated from" in capsys.readouterr().out


def test_functions_and_masks_of_a_file(capsys: pytest.CaptureFixture[str], path: Path) -> None:
    facts = facts_of(capsys, f"{path}:mine", "--sq", "64", "--heads", "2")
    q, kv = torch.arange(64)[:, None], torch.arange(64)
    assert facts["visible_pairs"] == 2 * int(((q - kv < 20) & (kv % 3 == 0)).sum())
    assert facts["mask"] == "from_function(mine)"
    assert facts["captured"]["tensors"] == [{"dtype": "bool", "shape": [64]}] and 20 in facts["captured"]["ints"]
    assert facts_of(capsys, f"{path}:a_mask", "--sq", "64")["mask"] == "causal(0)"


def test_text_for_people(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    picture = tmp_path / "mask.png"
    assert main(["explain", "causal(offset=Skv - Sq)", "--sq", "64", "--skv", "256", "--draw", str(picture)]) == 0
    out = capsys.readouterr().out
    for part in (
        "causal(192)\n",
        "le bool %",
        "ints: 192",
        "1 × 4 tiles of 64 × 64 positions, 1 map\n",
        "0 empty, 1 partial, 3 full: 100.0% visited",
        "visible pairs: 14,368 of 16,384 (87.7%), counted",
        " on sm_90, half",
        "def hide(x, other, b, h, q_idx, kv_idx, captures, ints, floats):",
        "███▒",
        f"drawn to {picture}",
    ):
        assert part in out, part
    assert picture.read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("what", "message"),
    [
        ("causl()", "did you mean causal?"),
        ("causal(", "SyntaxError"),
        ("causal() & 3", "a mask is a function"),
        ("sliding_window(1)", "TypeError"),
        ("document(torch.arange(3))", "capture one with 64 entries"),
        ("torch.ones(64, 64) > 0", "mask_from"),
        ("nowhere/masks.py:mine", "there is no file nowhere/masks.py"),
        ("masks.py", "masks.py:FUNCTION"),
        ("{path}:mime", "defines no mime; did you mean mine?"),
        ("{path}:score", "a mask takes (b, h, q_idx, kv_idx)"),
        ("{path}:asks", "Python's if"),
        ("{path}:number", "a mask is a function (b, h, q_idx, kv_idx) -> bool or a Mask, got a int"),
    ],
)
def test_what_is_no_mask(capsys: pytest.CaptureFixture[str], path: Path, what: str, message: str) -> None:
    assert main(["explain", what.replace("{path}", str(path)), "--sq", "64", "--json"]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    *printed, last = captured.err.splitlines()
    assert message in last and set(printed) <= {"hello from the file"}


def test_a_file_that_fails(capsys: pytest.CaptureFixture[str], path: Path) -> None:
    path.write_text("import nothing_of_this_name\n")
    assert main(["explain", f"{path}:mine", "--sq", "64"]) == 2
    assert "ModuleNotFoundError: No module named 'nothing_of_this_name'" in capsys.readouterr().err


@pytest.mark.parametrize(
    "arguments",
    [
        ["explain", "causal()"],
        ["explain", "causal()", "--sq", "0"],
        ["explain", "causal()", "--sq", "64", "--tile", "16x"],
        ["explain", "causal()", "--sq", "64", "--tile", "16x0"],
        ["explain", "causal()", "--sq", "64", "--arch", "h100"],
        ["explain", "causal()", "--sq", "64", "--dtype", "int8"],
        ["expound"],
        [],
    ],
)
def test_wrong_arguments(capsys: pytest.CaptureFixture[str], arguments: list[str]) -> None:
    with pytest.raises(SystemExit) as raised:
        main(arguments)
    assert raised.value.code == 2
    assert "error: " in capsys.readouterr().err


@pytest.mark.parametrize(
    ("option", "message"),
    [("--head-dim=20", "multiple of 8"), ("--draw=nowhere/a.png", "nowhere/a.png"), ("--draw=a.bmp2", ".png or .svg")],
)
def test_wrong_sizes_and_paths(capsys: pytest.CaptureFixture[str], option: str, message: str) -> None:
    assert main(["explain", "causal()", "--sq", "64", option]) == 2
    captured = capsys.readouterr()
    assert captured.out == "" and message in captured.err and captured.err.count("\n") == 1


def test_help_names_the_commands() -> None:
    command = [sys.executable, "-m", "anymask", "--help"]
    assert "explain" in subprocess.run(command, check=True, capture_output=True, text=True).stdout


def test_explain_imports_no_triton() -> None:
    script = """
import sys
from anymask.cli import main
code = main(["explain", "causal() & document(torch.arange(Sq) // 100)", "--sq", "512"])
loaded = [name for name in sys.modules if name.split(".")[0] == "triton" or name == "matplotlib"]
sys.exit(f"{code}, {loaded}" if code or loaded else 0)
"""
    subprocess.run([sys.executable, "-c", script], check=True, capture_output=True)
