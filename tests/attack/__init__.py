"""The attack: mutated streams, arrays, stores, certificates and requests, each made from a seed.

    python -m tests.attack streams --count 1000000 --jobs 4      # a long run; `make attack`
    python -m tests.attack stores --seed 4711 --count 1          # one case again
    python -m tests.attack --replay attack-findings/stores-4711  # from its bytes, whatever the seed

What is judged, in workers that are watched: the process lives, a case ends within its time, memory
stays below a limit, every refusal is one of `moebound.errors`, and what is taken is what was
written. cases.py says what a case is, watch.py runs them; each other file is one kind.
"""
