"""One module a format, for who writes it and who reads it: its name, its fields, their errors.

sensitivity_map.py   where errors hurt: `sensitivity/map/` writes it, `plan/` reads it
profile.py           which experts are used: `profile/` writes it, `plan/` reads it
study.py             a study's folder: `paper/study/` writes it, `paper/report/` and `plan/` read it
"""
