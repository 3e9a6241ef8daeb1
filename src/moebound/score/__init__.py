"""What measuring a model gives: one record of figures, and how each is spelled.

record.py      Score: KL, agreement, answers; to JSON and back
fields.py      each figure's name, unit and text; what tables show
statistics.py  intervals, paired tests, corrections

Below everything that measures, so that plans and stores can carry what was measured of them.
"""

from moebound.score.fields import KL, READ, TABLE, Field, kl_lines
from moebound.score.record import Score, Tally, Tokens

__all__ = ["KL", "READ", "TABLE", "Field", "Score", "Tally", "Tokens", "kl_lines"]
