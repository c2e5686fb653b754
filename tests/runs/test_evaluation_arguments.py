import pytest

from epmvg_hf.runs.evaluation_arguments import NamedBenchmark, parse_arguments


def parse(*arguments: str):
    return parse_arguments(["MODEL", "--benchmarks", *arguments], "epmvg evaluate")


@pytest.mark.parametrize(
    ("text", "benchmark"),
    [
        ("shapes", NamedBenchmark("shapes", (), None)),
        ("shapes:test", NamedBenchmark("shapes", ("test",), None)),
        ("refcoco=refer/data", NamedBenchmark("refcoco", (), "refer/data")),
        ("refcoco:testA,testB=refer/data", NamedBenchmark("refcoco", ("testA", "testB"), "refer/data")),
        ("custom: a, b =data", NamedBenchmark("custom", ("a", "b"), "data")),
        ("refcoco+=C:\\data:1=2,3", NamedBenchmark("refcoco+", (), "C:\\data:1=2,3")),
        ("custom:test=a=b:c", NamedBenchmark("custom", ("test",), "a=b:c")),
    ],
)
def test_a_benchmark_has_a_name_splits_and_a_folder(text, benchmark):
    assert parse(text).benchmarks == [benchmark]


@pytest.mark.parametrize("text", ["", "=data", "refcoco=", "refcoco:=data", "refcoco:testA,=data", ":test=data"])
def test_nothing_of_a_benchmark_may_be_empty(text, capsys):
    with pytest.raises(SystemExit, match="2"):
        parse(text)
    message = f"{text!r} is no benchmark, expected NAME=FOLDER or NAME:SPLIT,SPLIT=FOLDER"
    assert capsys.readouterr().err.splitlines()[-1] == f"epmvg evaluate: error: argument --benchmarks: {message}"


@pytest.mark.parametrize(("option", "number"), [("--limit", "0"), ("--batch_size", "-1"), ("--pictures", "few")])
def test_numbers_that_make_no_sense_are_refused(option, number, capsys):
    with pytest.raises(SystemExit, match="2"):
        parse("shapes", option, number)
    assert f"argument {option}: {number!r} is not a whole number from " in capsys.readouterr().err


def test_several_values_follow_one_flag():
    arguments = parse("shapes", "refcoco=DIR", "--splits", "validation", "test", "--report")
    assert [benchmark.name for benchmark in arguments.benchmarks] == ["shapes", "refcoco"]
    assert (arguments.splits, arguments.report, arguments.pictures) == (["validation", "test"], True, 0)
