"""What a zoo is for: applications on the rows of any zoo, each compared with the baselines that it has to beat.

Every application has a folder, whose front hands on its main names; the modules beside the folders are shared.
"""
