"""What a config will need, before anyone pays for it: bytes of memory and bytes on the wire, of one rank and of all.

    ledger.py       counts collectives and living storages while something runs, for real or on fake tensors
    rehearsal.py    the trainer's own build and step on a fake process group of any size: nothing is allocated, nothing travels
    paper.py        the same numbers by formulas, from the shapes alone
    report.py       the table and the picture
    main.py         `python launch/plan.py <settings of launch/train.py> ranks=8,64`
"""
