"""A statement is named by what it does, never by what is in it."""

from __future__ import annotations

import pytest

from stanch.summaries import summary_of

EXAMPLES = {
    "SELECT * FROM wuser_table WHERE username = ?": "SELECT wuser_table",
    "INSERT INTO shipping (order_id, address) SELECT order_id, address FROM orders": "INSERT shipping SELECT orders",
    "SELECT * FROM songs, artists WHERE songs.artist_id = artists.id": "SELECT songs artists",
    "SELECT d FROM (SELECT * FROM orders o JOIN customers c ON o.id = c.id)": "SELECT SELECT orders customers",
    'SELECT * FROM "song list", artists': 'SELECT "song list" artists',
    "call some_procedure(?)": "call",
    "SELECT a FROM s.a LEFT OUTER JOIN x.y.b USING (id, other)": "SELECT s.a x.y.b",
    "INSERT INTO t (a) VALUES (?) ON CONFLICT (a) DO UPDATE SET b = ? RETURNING t.id": "INSERT t",
    "UPDATE orders SET a = 1 FROM b, c AS d, e WHERE true": "UPDATE orders b c e",
    "DELETE FROM ONLY orders AS o USING customers, cities c WHERE true": "DELETE orders customers cities",
    "WITH x AS (INSERT INTO t SELECT 1 RETURNING id) SELECT * FROM x": "INSERT t SELECT SELECT x",
    "SELECT 1 FROM a WHERE b IS NOT DISTINCT FROM c ORDER BY d, e": "SELECT a",
    "SELECT extract(year FROM a), trim(both FROM b) FROM t FOR NO KEY UPDATE OF t": "SELECT t",
    "SELECT * FROM a, LATERAL (SELECT 1 FROM b) c, generate_series(1, 2) d": "SELECT a SELECT b generate_series",
    "MERGE INTO t USING s ON a = b WHEN MATCHED THEN UPDATE SET c = 1": "MERGE t s",
    "CREATE TABLE secrets (id int)": "CREATE TABLE",
    "SET LOCAL app.tenant = 'secret'": "SET",
    "SAVEPOINT sa_savepoint_1": "SAVEPOINT",
    "TABLE orders": "TABLE",
    "/* secret */ SELECT 'secret' -- secret": "SELECT",
}


@pytest.mark.parametrize(("sql", "summary"), EXAMPLES.items())
def test_summary_holds_operations_and_targets_in_their_order(sql: str, summary: str) -> None:
    assert summary_of(sql).text == summary


@pytest.mark.parametrize("sql", ["", "secret", "secret word", "SELECT 'secret", "?", ")(", "'secret'"])
def test_what_is_no_statement_has_no_summary(sql: str) -> None:
    assert "secret" not in summary_of(sql).text


def test_operation_is_told_where_there_is_one_kind() -> None:
    assert summary_of("SELECT 1 FROM a WHERE b IN (SELECT c FROM d)").operation == "SELECT"
    assert summary_of("insert into a select 1").operation is None
    assert summary_of("VALUES (1)").operation is None


def test_summary_of_any_length_is_cut_between_words() -> None:
    tables = [f"table_{number}" for number in range(100)]
    text = summary_of("SELECT 1 FROM " + ", ".join(tables)).text

    assert 240 < len(text) <= 255
    assert text.split()[1:] == tables[: len(text.split()) - 1]
