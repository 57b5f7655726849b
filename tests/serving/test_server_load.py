"""A short load: every answer is its version's own, whatever else is going on.

The long one is run by hand: python tests/helpers/serving_load.py --minutes 10
"""

import serving_load

REFUSED = {
    "malformed": "400",
    "bad UTF-8": "400",
    "10 MB": ("413", "refused"),
    "no key": "401",
    "wrong key": "401",
    "another's": "404",
    "unknown": "404",
    "broken": "503",
    "../first": "400",
    "/etc": "400",
    "nowhere": "404",
}


def test_a_server_under_load_crosses_and_loses_nothing(tmp_path):
    report = serving_load.run(tmp_path, seconds=6, clients=12, adapters=16, fit=5)
    told = "\n".join(report.lines())
    assert not report.wrong and not report.lost and report.over <= 0, told
    seen = {tuple(key.rsplit(" ", 1)) for key in report.statuses}
    assert {status for what, status in seen if what == "answer"} <= {"200", "404"}, told
    for what, expected in REFUSED.items():
        statuses = {status for kind, status in seen if kind == what}
        assert statuses and statuses <= {expected, *expected}, (what, told)
    assert {status for what, status in seen if what == "load"} <= {"200", "503"}, told
    assert report.statuses["load 200"] > 0 and report.statuses["vanished 200"] > 0, told
    assert all(report.seconds.values()), told
