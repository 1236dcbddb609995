"""Execution: the only place that knows all rooms. (Not called `run`, because `smsbatch.run` is the function.)"""
