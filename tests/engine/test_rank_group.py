"""The collectives of a group between processes, as the benchmark runs them on GPUs."""

from benchmarks import expert_exchange


def test_tokens_find_their_experts_and_back_between_processes(capsys):
    arguments = ["--device", "cpu", "--ranks", "2", "--tokens", "1,9", "--hidden", "256", "--part-tokens", "4"]
    assert expert_exchange.main(arguments) == 0
    assert "2 rank(s), cpu, 256 channels" in capsys.readouterr().out
