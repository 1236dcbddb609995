"""The import path that cards of older generators name; `smsbatch.Generator` is the public one."""

from smsbatch.generator.network import Generator as Generator
