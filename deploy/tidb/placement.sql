-- Where the five replicas of all that the service stores are: spread over three centres, with the leaders, which serve
-- reads and writes, in the first. Run it before the first migration, as a database passes its policy on to the tables
-- that are made after that. `SHOW PLACEMENT` says whether it is done. Once the first centre is lost for good:
-- ALTER PLACEMENT POLICY three_centres PRIMARY_REGION = 'site-2' REGIONS = 'site-2,site-3' FOLLOWERS = 2 SCHEDULE = 'EVEN';
-- Not run here: as TiDB's documents describe it.

CREATE PLACEMENT POLICY IF NOT EXISTS three_centres
    PRIMARY_REGION = 'site-1'
    REGIONS = 'site-1,site-2,site-3'
    FOLLOWERS = 4
    SCHEDULE = 'EVEN';

CREATE DATABASE IF NOT EXISTS kuaishang CHARACTER SET utf8mb4 PLACEMENT POLICY = three_centres;
