"""A store and an inbox in the host's own database, through async SQLAlchemy (``pip install 'silbo[sqlalchemy]'``).

PostgreSQL and SQLite. What is stored in a session commits or rolls back with everything else in it.
"""

from silbo._checks import require_extra

with require_extra("silbo.stores.sqlalchemy", extra="sqlalchemy", libraries=("sqlalchemy",)):
    import sqlalchemy as _  # noqa: F401

from silbo.stores.sqlalchemy.inbox import SQLAlchemyInbox
from silbo.stores.sqlalchemy.session import current_session, in_session
from silbo.stores.sqlalchemy.store import SQLAlchemyStore
from silbo.stores.sqlalchemy.tables import metadata

__all__ = ["SQLAlchemyInbox", "SQLAlchemyStore", "current_session", "in_session", "metadata"]
