"""First contact with a GPU: everything worth knowing in ten minutes. ``python -m bench first-contact --out DIR``.

    phases.py    what is done, in which order, for how long: data
    runner.py    the parent, which never touches the GPU: phases in child processes, deadlines, one JSON
    child.py     a child: one case after the other, what each found sent to the parent
    here.py      what a case sees of the machine
    layers.py, attention.py, quantized.py, races.py, machine.py, models.py    the cases
    tables.py    ``python -m bench tables``: what follows from the JSON
    second.py    a second run: the profiler, and the tests that failed

docs/gpu_campaign.md says how it is used.
"""
