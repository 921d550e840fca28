"""What an engine tells about waiting, computing and the sizes of its steps."""

from tests.engine.harness import Harness


def test_every_request_that_got_a_token_is_timed_once():
    harness = Harness(max_num_seqs=2)
    for number in range(5):
        harness.submit(f"r{number}", range(10 + number), max_tokens=4)
    harness.submit("aborted", range(8))
    harness.engine.abort("aborted")
    harness.run()
    stats = harness.engine.stats()
    for times in (stats.queue_time, stats.prefill_time, stats.inference_time):
        assert sum(times.counts) == 5
        assert times.total >= 0.0
    assert stats.inference_time.total >= stats.prefill_time.total
    # Every prompt token and every token but each request's last one was computed in some step.
    assert stats.step_tokens.total == sum(range(10, 15)) + 5 * 3
    assert sum(stats.step_tokens.counts) == stats.steps
