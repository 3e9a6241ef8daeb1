"""The built-in models and their problems.

draw.py       one draw of names, things and numbers; what is held out, and how
easy.py       the templates of `wordmath`
hard.py       the templates of `wordmath-hard`
formats.py    the four answer formats: asking, writing, judging
problems.py   the problems: a stable list to test on, an endless one to train on
tokenizer.py  words and digits
builtin.py    finds a model under its name: builtin:wordmath, builtin:wordmath-mixtral
model/        the first model, made by recipes/wordmath
mixtral/      the second, of another architecture, made by the same recipe
"""
