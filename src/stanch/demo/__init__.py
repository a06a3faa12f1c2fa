"""The demo: one small shop, served twice on a real PostgreSQL, under fire, and judged by the database.

``python -m stanch.demo`` runs it. Read ``shop.py`` to see what an app on stanch looks like, and
``handwritten.py`` for the pattern it is measured against; everything else drives traffic and counts.
"""
