"""Everything that mining has paid for, in one SQLite file that survives a killed process.

A score costs a forward pass of a large model, so it is written once, in the same transaction as
whatever says that its batch is done, and is never computed or overwritten again. One process
writes, any number read. Pools, proposals, scores, answers and the stages that are finished live
side by side, each row with a checksum that also covers the fingerprint of the model, prompt
template, generation settings, dataset and metric.

    with Store.open("runs/digits/store.sqlite", fingerprint) as store:
        todo = [record is None for record in store.get_scores(query_ids, pointers)]
        with store.transaction():
            store.put_scores(records)
            store.mark_done("score", {"rows": len(records)})

Query ids and demonstration ids are the dataset's int64 ids. A pointer is an ordered tuple of
demonstration ids; in arrays it is a row of [n, S], right-padded with -1, all -1 for zero-shot.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from lever_jax import store_schema as schema
from lever_jax.store_file import named_errors
from lever_jax.store_schema import StoreError
from lever_jax.store_scores import HOW, ScoreRecord, ScoreTables, as_ids

__all__ = ["HOW", "Proposals", "ScoreRecord", "Store", "StoreError"]


@dataclass(slots=True, eq=False)
class Proposals:
    """Pointers that samplers proposed, as columns in the order in which they were proposed.

    Attributes:
      query_ids: int64 [n].
      pointers: int64 [n, S], right-padded with -1.
      sources: n names of samplers.
      log_probs: float32 [n] under the behaviour policy, nats; NaN where it has none.
      kept: int8 [n]: 1 kept, 0 dropped, -1 not decided.
    """

    query_ids: np.ndarray
    pointers: np.ndarray
    sources: list[str]
    log_probs: np.ndarray
    kept: np.ndarray


class Store(ScoreTables):
    """The store; see the module's text. Make one with `Store.open` in a `with` statement."""

    # --- pools ----------------------------------------------------------------------------------

    def put_pools(
        self, query_ids: np.ndarray, demo_ids: np.ndarray, similarity: np.ndarray
    ) -> None:
        """Stores the candidate pool of each query; another pool for the same query is refused.

        A pool that is there keeps its similarities too: another machine computes the last bits of
        them differently, and that does not make it another pool.

        Args:
          query_ids: int64 [B].
          demo_ids: int64 [B, K], the demonstration of each action, right-padded with -1.
          similarity: float32 [B, K] to the query.
        """
        similarity = np.asarray(similarity, np.float32)
        if similarity.shape != np.shape(demo_ids):
            raise ValueError(f"similarity {similarity.shape} for demo_ids {np.shape(demo_ids)}")
        rows = []
        blobs = schema.pack_padded(demo_ids, "demo_ids")
        for query_id, blob, values in zip(as_ids(query_ids), blobs, similarity, strict=True):
            rows.append((query_id, blob, schema.pack_array(values[: len(blob) // 8])))
        with self.transaction():
            new = []
            for row in rows:
                stored = self._pool(row[0])
                if stored is None:
                    new.append(row)
                elif stored[1] != row[1]:
                    raise StoreError(
                        f"{self.path} has another candidate pool for query {row[0]}; a query has "
                        "one pool in mining, training and evaluation: give the bank (--max_bank, "
                        "and the same images readable), --encoder, --pool_size, --pool_shares, "
                        "--image_weight, --question_weight, --near_duplicate and --world_seed as "
                        "before, or another --workdir"
                    )
            self._insert_new("pools", new, "query_id")

    def get_pools(self, query_ids: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The pools of B queries: demonstration ids int64 [B, K] and similarity float32 [B, K].

        Padding is -1 and NaN. A query without a pool is an error; ask `has_pools` first.
        """
        rows = []
        with named_errors(self.path):
            for query_id in as_ids(query_ids):
                rows.append(self._pool(query_id))
                if rows[-1] is None:
                    raise StoreError(f"table pools has no query_id {query_id} in {self.path}")
        demo_ids = schema.unpack_padded([row[1] for row in rows])
        similarity = np.full(demo_ids.shape, np.nan, np.float32)
        for i, row in enumerate(rows):
            similarity[i, : len(row[1]) // 8] = schema.unpack_array(row[2])
        return demo_ids, similarity

    def has_pools(self, query_ids: np.ndarray) -> np.ndarray:
        """Bool [B]: whether each query has a pool."""
        sql = "SELECT 1 FROM pools WHERE query_id = ?"
        with named_errors(self.path):
            found = [self._db.execute(sql, (i,)).fetchone() is not None for i in as_ids(query_ids)]
        return np.array(found, bool)

    def _pool(self, query_id: int) -> tuple | None:
        sql = schema.select_sql("pools", "WHERE query_id = ?")
        row = self._db.execute(sql, (query_id,)).fetchone()
        return None if row is None else self._rows.open("pools", row, query_id=query_id)

    # --- proposals ------------------------------------------------------------------------------

    def put_proposals(
        self,
        stage: str,
        query_ids: np.ndarray,
        pointers: np.ndarray,
        sources: Sequence[str],
        log_probs: np.ndarray,
        kept: np.ndarray | None = None,
    ) -> int:
        """Stores what samplers proposed, in order, the first of equal pointers only.

        Args:
          stage: whose proposals these are, such as "warmup" or "grpo/round_3".
          query_ids: int64 [n].
          pointers: int64 [n, S], right-padded with -1.
          sources: n names of samplers.
          log_probs: float32 [n] under the behaviour policy, nats; NaN where it has none.
          kept: bool [n], or None to decide later with `mark_kept`.

        Returns:
          How many were new to the stage.
        """
        queries, blobs = as_ids(query_ids), schema.pack_padded(pointers, "pointers")
        log_probs = np.asarray(log_probs, np.float32).tolist()
        marks = [None] * len(queries) if kept is None else np.asarray(kept, bool).tolist()
        columns = zip(queries, blobs, sources, log_probs, marks, strict=True)
        with self.transaction():
            last = self._db.execute("SELECT max(id) FROM proposals").fetchone()[0] or 0
            rows = [
                (last + i, stage, query, blob, str(source), schema.real(log_prob), _mark(mark))
                for i, (query, blob, source, log_prob, mark) in enumerate(columns, start=1)
            ]
            return len(rows) - self._insert_new("proposals", rows, "stage, query_id, pointer")

    def mark_kept(
        self, stage: str, query_ids: np.ndarray, pointers: np.ndarray, kept: np.ndarray
    ) -> None:
        """Decides which stored proposals of a stage stay in their groups: kept is bool [n]."""
        find = schema.select_sql("proposals", "WHERE stage = ? AND query_id = ? AND pointer = ?")
        change = "UPDATE proposals SET kept = ?, checksum = ? WHERE id = ?"
        keys = zip(as_ids(query_ids), schema.pack_padded(pointers, "pointers"), strict=True)
        with self.transaction():
            for key, mark in zip(keys, np.asarray(kept, bool).tolist(), strict=True):
                row = self._db.execute(find, (stage, *key)).fetchone()
                if row is None:
                    name = schema.name_row("proposals", (0, stage, *key))
                    raise StoreError(f"table proposals has no {name} in {self.path}")
                known = {"stage": stage, "query_id": key[0], "pointer": key[1]}
                row = (*self._rows.open("proposals", row, **known)[:-1], _mark(mark))
                checksum = self._rows.of("proposals", row)
                self._db.execute(change, (_mark(mark), checksum, row[0]))

    def get_proposals(self, stage: str, query_ids: Sequence[int] | None = None) -> Proposals:
        """The proposals of a stage in order, of all its queries or query by query as given."""
        with named_errors(self.path):
            if query_ids is None:
                sql = schema.select_sql("proposals", "WHERE stage = ? ORDER BY id")
                rows = self._db.execute(sql, (stage,)).fetchall()
            else:
                sql = "WHERE stage = ? AND query_id = ? ORDER BY id"
                sql = schema.select_sql("proposals", sql)
                rows = [r for i in as_ids(query_ids) for r in self._db.execute(sql, (stage, i))]
            rows = [self._rows.open("proposals", row, stage=stage) for row in rows]
        names: dict[str, str] = {}
        return Proposals(
            query_ids=np.array([row[2] for row in rows], np.int64),
            pointers=schema.unpack_padded([row[3] for row in rows]),
            sources=[names.setdefault(row[4], row[4]) for row in rows],
            log_probs=np.array([row[5] for row in rows], np.float32),  # None becomes NaN.
            kept=np.array([-1 if row[6] is None else row[6] for row in rows], np.int8),
        )

    def proposal_stages(self) -> list[str]:
        """The stages that have proposals, by name."""
        with named_errors(self.path):
            rows = self._db.execute("SELECT DISTINCT stage FROM proposals ORDER BY stage")
            return [row[0] for row in rows]

    def proposed_queries(self, stage: str) -> np.ndarray:
        """Int64 [n]: the queries of a stage, in the order in which they were first proposed to."""
        sql = "SELECT query_id FROM proposals WHERE stage = ? GROUP BY query_id ORDER BY min(id)"
        with named_errors(self.path):
            rows = self._db.execute(sql, (stage,)).fetchall()
        return np.array([row[0] for row in rows], np.int64)


def _mark(kept: bool | None) -> int | None:
    return None if kept is None else int(kept)
