"""Everything that waits for a GPU, in one command: `python -m recipes.bench.gpu --minutes 25 --out DIR` (`make gpu`).

`steps` says what, the most valuable first. Each step is a process with a time limit that writes its result as it goes
(`running`); what was finished is not run again. `setup` finds out what the machine has and adds what it lacks from a
folder of wheels that `wheels` collected elsewhere; `report` puts every number beside its goal.
"""
