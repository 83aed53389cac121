"""Is a probe right, and does a family keep the contract? What authors run on their own code.

Belongs here: checks of users' probes and families against models whose answer is known. Does not:
the answers themselves (`groundtruth`), and tests of dit_lens (the folder tests/).

    dit_lens.testing.check_family("DiTTransformer2DModel")  # raises if it fails
    rows = dit_lens.testing.check_probe(MyProbe)
    assert all(row.ok for row in rows), [row for row in rows if not row.ok]
"""

from .family_contract import check_family
from .probe_checks import check_probe

__all__ = ["check_family", "check_probe"]
