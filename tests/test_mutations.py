"""The list of deliberate bugs fits the code. python -m pytest tests/test_mutations.py (python tests/mutations.py tries them)"""
import pytest

from conftest import ROOT
from mutations import MUTATIONS


def test_there_are_at_least_forty_different_bugs():
    assert len(MUTATIONS) >= 40 and len({m[0] for m in MUTATIONS}) == len(MUTATIONS)


@pytest.mark.parametrize("what, file, old, new, tests", MUTATIONS, ids=[m[0] for m in MUTATIONS])
def test_every_bug_can_be_put_in(what, file, old, new, tests):
    text = (ROOT / file).read_text(encoding="utf-8")
    assert text.count(old) == 1 and new != old
    compile(text.replace(old, new), file, "exec")
    assert all((ROOT / t).is_file() for t in tests.split() if t.endswith(".py"))
