"""What a run would do, without doing it: --dry_run, --debug_dataset, --vram_budget and --plan_memory.

In reading order, each file asked by later ones:
- meter: bytes that are alive and seconds on a GPU of the middle, of any computation
- simulate: a training step on the meta device, with a meter beside it
- holdings: what is kept of the model and of what is trained, from step to step
- texts: what the text encoder is given, and how long that is
- memory_estimate: all of it, part by part, for the options of a run or for others
- memory_plan: ways to make a step, what each takes, and which is chosen
- planner: finds them, and chooses by the estimate
- budget: --vram_budget in a run
- measure: --plan_memory makes real steps beside the estimate, and lets the planner choose by what it found
- dry_run: the report of --dry_run, with the estimate and the planner's choice
- contact_sheet: pictures as they are trained on, drawn for dry_run
"""
