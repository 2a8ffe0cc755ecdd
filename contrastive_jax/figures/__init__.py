"""Pictures of a run. Each function gives the bytes of a PNG file; `write` makes it one.

`sheets` are tiles of images, by Pillow: augmented views, what a search has found, neighbours,
attention. `curves` and `plots` are Matplotlib's, imported when a figure is drawn, and without
pyplot: no global state, no display.
"""

from contrastive_jax.figures.curves import training_curves as training_curves
from contrastive_jax.figures.plots import confusion as confusion
from contrastive_jax.figures.plots import depth as depth
from contrastive_jax.figures.plots import heat as heat
from contrastive_jax.figures.plots import scatter as scatter
from contrastive_jax.figures.sheets import Tile as Tile
from contrastive_jax.figures.sheets import contact_sheet as contact_sheet
from contrastive_jax.figures.sheets import tile_rows as tile_rows
from contrastive_jax.figures.sheets import views_grid as views_grid
from contrastive_jax.figures.style import COLOURS as COLOURS
from contrastive_jax.figures.style import write as write
