"""The replay reservoir: an index of documents that a run has trained on, and a view of it as a data set.

Numbers alone, without torch: `rows` names what an entry stands for, `keys` draws its key, `entries` keeps the smallest
keys, `quotas` shares the room out over domains, `reservoir` joins these, `files` has it on the disk, `generation` is a
frozen state of it, and `view` the data set over one.
"""
