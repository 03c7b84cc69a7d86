"""A package with drawn golden samples in the place of real images, so that it can be shown."""

import dataclasses

from fieldmark.errors import IntegrityError, MissingDependency, PackageError
from fieldmark.evaluation.backends import open_backend, open_reference
from fieldmark.evaluation.finish import NUM_GOLDEN
from fieldmark.packaging.draft import Draft, with_checks, with_golden
from fieldmark.packaging.golden import check_golden, make_golden, synthetic_images
from fieldmark.packaging.resolve import resolve_model
from fieldmark.runtime.log import warn


def redraw_golden(draft: Draft) -> Draft:
    """Return the draft with drawn images and what the trained model makes of them.

    Each variant is run on them anew: its file is the same, so what was measured of it on real
    images still holds. The same package and versions give the same draft.
    """
    model = resolve_model(str(draft.path))
    images = synthetic_images(NUM_GOLDEN, seed=0)
    golden = make_golden(images, draft.preprocess, open_reference(model), draft.class_names)
    drawn = with_golden(draft, golden)
    model = dataclasses.replace(model, package=drawn)
    checks = {}
    for name, variant in drawn.manifest.variants.items():
        try:
            predict = open_backend(model, name)
        except IntegrityError:
            raise
        except (MissingDependency, PackageError) as error:
            warn(f"variant {name!r} cannot be run here on the drawn golden samples: {error}")
            continue
        checks[name] = check_golden(drawn, predict, variant.precision)
    return with_checks(drawn, checks)
