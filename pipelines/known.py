"""Known: what the ledger's earlier runs taught of the job's pools, looked up once at the start of a run or quote."""

from __future__ import annotations

from datetime import datetime

from bidbeam.connectors.store import Store
from bidbeam.pipelines.job import Job
from bidbeam.transforms.reputation import HISTORY_DAYS, Reputation, reputations


def known_pools(job: Job, ledger: Store, now: datetime) -> dict[tuple[str, str], Reputation]:
    """(pool, model) -> its reputation in this ledger, which is the rehearsals' own for a rehearsal."""
    from bidbeam.connectors.ledger_history import read_deeds

    models = sorted({model for pool in job.pools for model in pool.models})
    deeds = read_deeds(ledger, job=job.name, models=models, around=(now.date(), job.run_date), days=HISTORY_DAYS)
    return reputations(deeds, job.pools, now=now)
