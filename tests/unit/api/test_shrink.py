"""How well errors of candidates have to be known."""

from unittest.mock import Mock

import pytest

from tersor.api import shrink
from tersor.api.session import Session
from tersor.propose.sampling import Precision


@pytest.mark.parametrize("affordable", [256, 20])
def test_a_size_asks_for_more_samples_of_small_errors(
    monkeypatch: pytest.MonkeyPatch, affordable: int
) -> None:
    monkeypatch.setattr(shrink, "_affordable", lambda *_: affordable)
    session = Mock(Session)
    session.settings = Mock()
    session.settings.for_size = False
    usual = shrink.error_precision(session)
    assert usual == Precision(most=affordable)
    session.settings.for_size = True
    small = shrink.error_precision(session)
    assert (small.most, small.least) == (affordable, min(32, affordable))
    assert small.floor == usual.floor / 10
