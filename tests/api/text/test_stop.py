import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from api.stop import StopMatcher

letters = st.text(alphabet="ab\n", max_size=12)


def run(chunks, stops, **options):
    matcher = StopMatcher(stops, **options)
    text = "".join(matcher.push(chunk).text for chunk in chunks)
    return (text if matcher.stopped_by else text + matcher.finish()), matcher.stopped_by


def by_definition(text, stops):
    """The stop string whose last character comes first; of several that end there, the longest."""
    for end in range(1, len(text) + 1):
        found = [stop for stop in stops if text[:end].endswith(stop)]
        if found:
            longest = max(found, key=len)
            return text[: end - len(longest)], longest
    return text, None


@settings(max_examples=500, deadline=None)
@given(
    text=letters, stops=st.lists(st.text(alphabet="ab\n", min_size=1, max_size=4), max_size=4), cut=st.integers(0, 12)
)
def test_the_first_complete_stop_string_ends_the_text_however_it_is_cut(text, stops, cut):
    expected = by_definition(text, stops)
    assert run([text], stops) == expected
    assert run(text, stops) == expected
    assert run([text[:cut], text[cut:]], stops) == expected


def test_text_that_may_become_a_stop_string_is_held_back():
    matcher = StopMatcher(["STOP", "\n\n"])
    assert matcher.push("go S").text == "go "
    assert matcher.push("TO").text == ""
    assert matcher.push("RM\n").text == "STORM"
    assert matcher.push("x").text == "\nx"
    assert matcher.push(" STO").text == " "
    assert matcher.finish() == "STO"


def test_nothing_follows_a_stop_string():
    matcher = StopMatcher(["STOP"])
    result = matcher.push("aSTOPb")
    assert (result.text, result.stopped_by, matcher.stopped_by) == ("a", "STOP", "STOP")
    assert matcher.push("more").text == ""
    assert matcher.finish() == ""


def test_the_stop_string_itself_can_be_passed_on():
    assert run("abSTOPc", ["STOP"], include_stop=True) == ("abSTOP", "STOP")


def test_empty_stop_strings_are_refused():
    with pytest.raises(ValueError, match="empty"):
        StopMatcher(["a", ""])
