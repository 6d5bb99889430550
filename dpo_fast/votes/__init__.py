"""People's votes on pairs of images: what was voted, how far voters agree, win rates and strengths with intervals."""
