-- KEYS  1 meta, 2 bits, 3 open.  Answers dataset, sequence, count, then how many are accepted,
-- claimed, held and closed.
local meta = redis.call('HMGET', KEYS[1], 'dataset', 'seq', 'count')
if not meta[1] or redis.call('STRLEN', KEYS[2]) * 8 < tonumber(meta[3]) then return {'missing'} end
local kinds = {c = 0, h = 0, x = 0}
for _, matter in ipairs(redis.call('HVALS', KEYS[3])) do
  local kind = string.sub(matter, 1, 1)
  kinds[kind] = kinds[kind] + 1
end
return {'ok', meta[1], tonumber(meta[2]), tonumber(meta[3]), redis.call('BITCOUNT', KEYS[2]),
  kinds.c, kinds.h, kinds.x}
