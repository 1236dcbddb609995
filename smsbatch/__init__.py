"""smsbatch: stylize image datasets with Style Matching Score. `__init__.pyi` lists the whole public API.

    import smsbatch as sb

    manifest = sb.load("manifests/demo.yaml")
    print(sb.plan(manifest))
    report = sb.run(manifest)

Everything is imported when it is first used, so that `import smsbatch` costs nothing.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
