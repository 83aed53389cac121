"""Is a probe right, and does a family keep the contract? What authors run on their own code.

Belongs here: checks of users' probes and families against models whose answer is known. Does not:
the answers themselves (`groundtruth`), and tests of dit_lens (the folder tests/).
"""
