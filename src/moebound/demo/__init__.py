"""The whole road on one model: profile, study, plan, compress, verify, evaluate, and a page of it.

Every step calls what the command of its name calls; what it leaves lies in one folder.

folder.py        the output folder: what is in it, and whether a run goes on
report.py        what was found, as data
stores.py        a bound for all experts, or a plan -> a store -> verified, loaded, compared
road.py          the steps, one after the other -> a report
columns.py       columns of figures, for the terminal and the page alike
plots.py         the page's own figures
page.py          the page: its sections in order
page_model.py    sections on the model: what it solves, which experts it uses, where errors hurt
page_stores.py   sections on the stores: the plan, sizes, losses, answers, speeds
"""
