-- KEYS  5 run, 6 recent opt-outs.
-- ARGV  4 lane, 5 scopes of consent by line; then asks: ordinal 4, generation 4, attempt 2,
--       deadline 8, valid until 8, recipient 8, provider.
-- Answers 'ok', sequence, now, status, then for each ask a number, or the matter that stands.
local CLAIMED, REPEATED, ACCEPTED, STALE, NOT_RUNNING = 1, 2, 3, 4, 5
local ENDED = {cancelled = 'cancelled/run_cancelled', expired = 'expired/run_expired'}

local outside = load(6)
if outside then return {'outside', outside, count} end
local critical = ARGV[4] == 'critical'
local status = redis.call('HGET', KEYS[5], 'status')

local scopes = {}
if redis.call('EXISTS', KEYS[6]) == 1 then
  for scope in string.gmatch(ARGV[5], '[^\n]+') do scopes[#scopes + 1] = scope end
end
local function opted_out(recipient)
  if #scopes == 0 then return false end
  local members = {}
  for i, scope in ipairs(scopes) do members[i] = recipient .. scope end
  for _, at in ipairs(redis.call('ZMSCORE', KEYS[6], unpack(members))) do
    if at and now - at < OPT_OUT_MEMORY_MS then return true end
  end
  return false
end

local function judge(ask)
  local field = sub(ask, 1, 4)
  local found = open[field]
  local kind = found and sub(found, 1, 1)
  local generation, deadline, valid_until = read('>I4xxI8I8', ask, 5)
  if accepted[field] then return ACCEPTED end
  if kind == 'x' and read('>I4', found, 6) >= generation then return found end
  if kind == 'h' then return found end

  local own, doubt = false, false
  if kind == 'c' then
    if sub(found, 2, 5) == owner then
      own = sub(found, 6, 11) == sub(ask, 5, 10) and sub(found, 21) == sub(ask, 35)
      if not own then return found end
    elseif not critical then
      return hold(field, '\1')
    end
    doubt = not own or sub(found, 12, 12) == '\1'
  end

  local final, refusal
  if status ~= 'running' then
    final, refusal = ENDED[status], NOT_RUNNING
  elseif now >= deadline then
    final = 'expired/deadline'
  elseif now >= valid_until then
    refusal = STALE
  elseif opted_out(sub(ask, 27, 34)) then
    final = 'failed/opted_out'
  else
    if not own then
      local flag = doubt and '\1' or '\0'
      put(field, 'c' .. owner .. sub(ask, 5, 10) .. flag .. now8 .. sub(ask, 35))
    end
    return doubt and REPEATED or CLAIMED
  end

  if final and doubt then return hold(field, '\1') end
  if final then
    put(field, 'x' .. owner .. sub(ask, 5, 10) .. '\0' .. now8 .. final)
    return open[field]
  end
  if doubt then disown(field) elseif own then put(field, false) end
  return refusal
end

local answer = {'ok', 0, now, status or ''}
for i = 6, #ARGV do answer[i - 1] = judge(ARGV[i]) end
answer[2] = save()
return answer
