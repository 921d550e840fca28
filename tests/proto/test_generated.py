from tools.proto import stale


def test_checked_in_code_is_what_the_proto_files_generate():
    assert stale() == []
