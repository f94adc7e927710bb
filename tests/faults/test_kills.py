"""A few of the kills of ``tests/faults/kills.py``, which makes a hundred, and all that it proves beside them."""

import signal

from tests.faults import jobs, kills


def test_killed_training_ends_like_an_undisturbed_one(inputs, whole, tmp_path):
    done = kills.kill_until_done(inputs, tmp_path, "sam_ft", whole, 1, 1)
    assert sum(number for what, number in done.items() if "," in what) == 1


def test_killed_cache_filling_ends_like_an_undisturbed_one(inputs, tmp_path):
    script, options = kills.KINDS["cache"]
    code, said = jobs.run(inputs, inputs.arguments(tmp_path / "whole", **options), script=script)
    assert code == 0, said
    done = kills.kill_until_done(inputs, tmp_path, "cache", tmp_path / "whole", 1, 1)
    assert done["jobs that ended"] == 1


def test_a_signal_saves_and_ends(inputs, whole, tmp_path):
    kills.signals(inputs, tmp_path, whole, {signal.SIGTERM: 143}, "sam_ft")


def test_a_second_signal_ends_at_once(inputs, tmp_path):
    kills.second_signal(inputs, tmp_path)


def test_two_processes_on_one_folder(inputs, tmp_path):
    kills.two_processes(inputs, tmp_path)
