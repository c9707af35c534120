"""Job: an output that is made over several starts, by any number of processes, and appears when it is whole.

Beside ``out`` stands ``.out.partial`` until then::

    job.json            what is made: request, coefficients, blocks, and the name of the folder of work
    job.<digest>.json   what is made instead of what the record with that digest says
    .work.<...>.tmp/    files/: what becomes ``out``; done/<...>.txt: journals of the blocks that are done

Records are only ever added, whole, each to a name that one process alone can give. No two folders of work share a name,
so that a process that another job left behind spoils nothing of this one. Nothing here is collective.
"""

from sharded_phema.job.place import FORMAT
from sharded_phema.job.shared import Job
from sharded_phema.job.start import begin

__all__ = ["FORMAT", "Job", "begin"]
