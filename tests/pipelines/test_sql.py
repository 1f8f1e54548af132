"""`saeql sql`: formats, files, limits, statements from stdin and from a person."""

import csv
import fcntl
import io
import json
import os
import pty
import select
import signal
import subprocess
import sys
import termios
from pathlib import Path

import pyarrow as pa
import pytest
from pyarrow import feather, parquet

from saeql.pipelines.cli import main

FEATURES = "SELECT feature, label, density, top_tokens FROM features ORDER BY feature"


def run(capsys: pytest.CaptureFixture[str], *argv: object) -> tuple[str, str]:
    """stdout and stderr of `saeql sql ARGV`."""
    main(["sql", *map(str, argv)])
    output = capsys.readouterr()
    return output.out, output.err


def fails(capsys: pytest.CaptureFixture[str], *argv: object) -> str:
    with pytest.raises(SystemExit) as caught:
        main(["sql", *map(str, argv)])
    output = capsys.readouterr()
    assert caught.value.code == 2 and output.err.count("\n") == 1 and "Traceback" not in output.err
    return output.err


@pytest.fixture(scope="module")
def features(tiny_run: Path) -> list[dict]:
    from saeql.pipelines import Run

    with Run.open(tiny_run).store() as store:
        return store.trusted_sql(FEATURES).to_pylist()


def test_every_format_holds_the_same_rows(
    tiny_run: Path, tmp_path: Path, features: list[dict], capsys: pytest.CaptureFixture[str]
) -> None:
    for flags in (["--json"], ["--format", "json"]):
        assert json.loads(run(capsys, tiny_run, FEATURES, *flags)[0]) == features
    for flags in (["--csv"], ["--format", "csv"]):
        rows = list(csv.DictReader(io.StringIO(run(capsys, tiny_run, FEATURES, *flags)[0])))
        assert [float(r["density"]) for r in rows] == [f["density"] for f in features]
        assert [json.loads(r["top_tokens"]) for r in rows] == [f["top_tokens"] for f in features]
    table = run(capsys, tiny_run, FEATURES)[0].splitlines()
    assert table[0].split() == ["feature", "label", "density", "top_tokens"] and len(table) >= len(features) + 1

    for name in ("a.json", "a.csv", "a.arrow", "a.feather", "a.parquet"):
        assert run(capsys, tiny_run, FEATURES, "--out", tmp_path / name) == ("", "")
    assert json.loads((tmp_path / "a.json").read_text()) == features
    assert len((tmp_path / "a.csv").read_text().splitlines()) == len(features) + 1
    assert feather.read_table(tmp_path / "a.feather").to_pylist() == features
    assert pa.ipc.open_file(tmp_path / "a.arrow").read_all().to_pylist() == features
    assert parquet.read_table(tmp_path / "a.parquet").to_pylist() == features
    run(capsys, tiny_run, FEATURES, "--out", tmp_path / "rows", "--format", "parquet")
    assert parquet.read_table(tmp_path / "rows").num_rows == len(features)


def test_arrow_and_parquet_go_through_a_pipe(tiny_run: Path, features: list[dict]) -> None:
    command = [sys.executable, "-m", "saeql.pipelines", "sql", tiny_run, FEATURES, "--format"]
    arrow = subprocess.run([*command, "arrow"], capture_output=True, check=True)
    assert pa.ipc.open_stream(arrow.stdout).read_all().to_pylist() == features and not arrow.stderr
    piped = subprocess.run([*command, "parquet"], capture_output=True, check=True)
    assert parquet.read_table(io.BytesIO(piped.stdout)).to_pylist() == features


def test_values_that_json_and_csv_have_no_word_for(tiny_run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    query = """
        SELECT sum(i)::HUGEINT AS h, 1.25::DECIMAL(5, 2) AS d, 'nan'::DOUBLE AS n, 'inf'::FLOAT AS i, NULL AS z,
               DATE '2026-01-02' AS t, '\\xAA'::BLOB AS b, {'x': ['nan'::DOUBLE, 1]} AS s, 1 AS a, 2 AS a
        FROM range(10) r(i)
    """
    told = json.loads(run(capsys, tiny_run, query, "--json")[0])
    assert told == [
        {"h": 45, "d": 1.25, "n": None, "i": None, "z": None, "t": "2026-01-02", "b": "aa", "s": {"x": [None, 1.0]},
         "a": 1, "a_1": 2}
    ]  # fmt: skip
    header, row = csv.reader(io.StringIO(run(capsys, tiny_run, query, "--csv")[0]))
    assert len(header) == 10
    assert row == ["45", "1.25", "nan", "inf", "", "2026-01-02", "aa", '{"x": [null, 1.0]}', "1", "2"]
    assert "aa" in run(capsys, tiny_run, query)[0]


def test_a_cut_result_says_so(tiny_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out, err = run(capsys, tiny_run, "FROM activations", "--max-rows", 3, "--json")
    assert len(json.loads(out)) == 3 and err == "saeql: only the first 3 rows; --max-rows gives more\n"
    out, err = run(capsys, tiny_run, "FROM range(1001)", "--csv")
    assert len(out.splitlines()) == 1001 and "only the first 1000 rows" in err
    assert run(capsys, tiny_run, "FROM range(1000)", "--csv")[1] == ""
    assert run(capsys, tiny_run, "FROM range(1001)", "--out", tmp_path / "all.csv") == ("", "")
    assert len((tmp_path / "all.csv").read_text().splitlines()) == 1002


def test_limits(tiny_run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    bomb = "SELECT count(*) FROM range(10000000) a, range(10000000) b"
    assert "longer than 0.3 s and was stopped" in fails(capsys, tiny_run, bomb, "--timeout", 0.3)
    hungry = "SELECT length(repeat('x', 2000000000)) AS n"
    assert "more memory than it may have" in fails(capsys, tiny_run, hungry, "--memory", "200MB")
    assert "larger than 95.3674 MiB" in fails(
        capsys, tiny_run, "SELECT repeat('x', 1000) FROM range(200000)", "--memory", "200MB", "--max-rows", 200_000
    )
    assert "'2' is no amount of memory" in fails(capsys, tiny_run, "SELECT 1", "--memory", "2")


def test_requests_that_contradict_themselves(
    tiny_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "two.sql").write_text("SELECT 1; SELECT 2")
    two = ["--file", tmp_path / "two.sql"]
    for argv, message in [
        (["SELECT 1", "--json", "--csv"], "name one format"),
        (["SELECT 1", "--json", "--format", "json"], "name one format"),
        (["SELECT 1", "--format", "xml"], "no format 'xml': there are table, json, csv, arrow, parquet"),
        (["SELECT 1", "--out", tmp_path / "x.txt"], "x.txt does not say a format"),
        (["SELECT 1", "--out", tmp_path / "x.csv", "--format", "table"], "a table is for the screen"),
        (["SELECT 1", *two], "not both"),
        ([*two, "--format", "arrow"], "2 statements have 2 results"),
        (["--file", tmp_path / "none.sql"], "cannot read"),
        (["SELECT 1; SELECT 2"], "give one SQL statement, not 2"),
    ]:
        assert message in fails(capsys, tiny_run, *argv)
    assert [p.name for p in tmp_path.iterdir()] == ["two.sql"]
    assert "no run and no store in" in fails(capsys, tmp_path, "SELECT 1")


def test_statements_from_a_file_and_from_stdin(
    tiny_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    text = "SELECT 1 AS x;\n-- the next\nSELECT ';' AS y"
    (tmp_path / "some.sql").write_text(text)
    assert run(capsys, tiny_run, "--file", tmp_path / "some.sql", "--csv")[0] == "x\n1\n\ny\n;\n"
    monkeypatch.setattr(sys, "stdin", io.StringIO(text))
    assert run(capsys, tiny_run, "--json")[0] == '[{"x": 1}]\n[{"y": ";"}]\n'
    monkeypatch.setattr(sys, "stdin", io.StringIO("SELECT 1;\n\nSELECT nope;\nSELECT 3"))
    with pytest.raises(SystemExit):
        main(["sql", str(tiny_run), "--csv"])
    output = capsys.readouterr()
    assert output.out == "1\n1\n" and output.err.startswith("saeql: statement 2, line 3: Binder Error")
    monkeypatch.setattr(sys, "stdin", io.StringIO("-- nothing"))
    assert "no SQL statement" in fails(capsys, tiny_run)


def test_a_person_at_a_prompt(tiny_run: Path, tmp_path: Path) -> None:
    """On a real terminal: a statement over two lines, an error that does not end it, Ctrl-C, and the way out."""
    outer, inner = pty.openpty()
    environment = {**os.environ, "HOME": str(tmp_path), "TERM": "dumb"}
    command = [sys.executable, "-m", "saeql.pipelines", "sql", tiny_run]

    def at_a_terminal() -> None:
        fcntl.ioctl(0, termios.TIOCSCTTY, 0)
        signal.signal(signal.SIGINT, signal.SIG_DFL)  # tests that run in the background were told to ignore it

    process = subprocess.Popen(
        command, stdin=inner, stdout=inner, stderr=inner, env=environment, start_new_session=True,
        preexec_fn=at_a_terminal,
    )  # fmt: skip
    os.close(inner)
    shown = b""

    def wait_for(text: bytes, press: bytes = b"") -> None:
        """Until the text is shown; a key may be pressed again, since Ctrl-C just before readline waits is not seen."""
        nonlocal shown
        os.write(outer, press)
        tries = 30 if press else 1
        while text not in shown:
            try:
                piece = os.read(outer, 4096) if select.select([outer], [], [], 300 / tries)[0] else b""
            except OSError:
                piece = b""
            if not piece and press and tries > 1:
                tries -= 1
                os.write(outer, press)
                continue
            assert piece, f"{text!r} never came, but {shown!r}"
            shown += piece

    def say(text: str, then: bytes) -> None:
        nonlocal shown
        shown = b""
        os.write(outer, text.encode())
        wait_for(then)

    wait_for(b"saeql> ")
    say("SELECT 40 +\n", b"...> ")
    say("2 AS answer;\n", b"(1 rows, ")
    assert b"42" in shown
    say("SELECT nope;\n", b"saeql: Binder Error")
    say("SELECT 'half\n", b"...> ")
    shown = b""
    wait_for(b"saeql> ", press=b"\x03")
    say("SELECT count(*) AS n FROM features;\n", b"(1 rows, ")
    assert b"96" in shown
    os.write(outer, b"quit\n")
    assert process.wait(timeout=300) == 0
    os.close(outer)
    assert list(tmp_path.iterdir()) == []
