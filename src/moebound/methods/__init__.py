"""Everything that makes experts smaller."""
